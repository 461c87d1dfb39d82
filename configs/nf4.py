"""Weights rounded to quantiles of a normal distribution, 4 bits, one scale a group of 64 (QLoRA)."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": 'canonicalize,fuse_attention,quantize{scheme="nf4:g64"}'})
