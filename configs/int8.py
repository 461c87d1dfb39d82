"""Weights rounded to 8 bits, one scale an output channel; activations stay float32."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": "canonicalize,fuse_attention,quantize{scheme=int8,granularity=channel}"})
