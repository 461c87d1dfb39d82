"""Weights rounded to 4-bit floats, a power of two a group of 32 (OCP MX); activations stay float32."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": 'canonicalize,fuse_attention,quantize{scheme="mxfp4"}'})
