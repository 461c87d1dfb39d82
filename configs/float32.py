"""Weights as they are: what every lossy pipeline is measured against."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"passes": "canonicalize,fuse_attention"})
