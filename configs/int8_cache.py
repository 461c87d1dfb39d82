"""The weights of `int8`, and keys and values kept in 8 bits, one scale a token and head."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    quantize = "quantize{scheme=int8,granularity=channel}"
    return ConfigDict({"passes": f"canonicalize,fuse_attention,{quantize},kv_cache,cache_layout{{dtype=int8}}"})
