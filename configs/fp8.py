"""Weights and activations rounded to 8-bit floats, one scale an output channel and one a token (W8A8)."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": 'canonicalize,fuse_attention,quantize{scheme="fp8_e4m3:channel,a=fp8_token"}'})
