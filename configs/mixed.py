"""Most weights in 4 bits; the embedding, the head, and the projections down into the residual stream in 8."""

from ml_collections import ConfigDict

RULES = ((".*(lm_head|embed|wte).*", "int8:channel"), (".*down.*", "int8:channel"))


def get_config() -> ConfigDict:
    rules = "".join(f'("{weights}","{scheme}",),' for weights, scheme in RULES)
    return ConfigDict({"passes": f'canonicalize,fuse_attention,quantize{{scheme="int4:g32",rules=({rules})}}'})
