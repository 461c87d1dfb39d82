"""Weights in 4 bits as of `int4`, levels by GPTQ, scales by search; needs calibration text."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": 'canonicalize,fuse_attention,quantize{scheme="int4:g32",method=gptq}'})
