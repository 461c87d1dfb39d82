"""Weights rounded to 4 bits, one scale a group of 32; activations stay float32."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": "canonicalize,fuse_attention,quantize{scheme=int4,group=32}"})
