"""Weights rounded to 4-bit floats, an 8-bit scale a group of 16; activations stay float32."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": 'canonicalize,fuse_attention,quantize{scheme="nvfp4"}'})
