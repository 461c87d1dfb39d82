"""Weights and activations rounded to 8 bits, one scale an output channel and one a token (W8A8); sums are exact."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": 'canonicalize,fuse_attention,quantize{scheme="int8:channel,a=int8_token"}'})
