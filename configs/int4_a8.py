"""Weights rounded to 4 bits, one scale a group of 32; activations rounded to 8 bits, 32 of a token at a time."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": "canonicalize,fuse_attention,quantize{scheme=int4,group=32,activations=int8}"})
