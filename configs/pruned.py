"""A quarter of the heads and a tenth of the neurons removed, by what they do on calibration tokens; no healing."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    prune = "prune_structured{heads=0.25,neurons=0.1,score=activation}"
    return ConfigDict({"passes": f"canonicalize,fuse_attention,{prune}"})
