"""Weights in 4 bits, one scale a group of 128, levels by GPTQ; needs calibration text."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": 'canonicalize,fuse_attention,quantize{scheme="int4:g128",method=gptq}'})
