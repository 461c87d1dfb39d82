"""The best mix of schemes that have kernels, in as many bits a weight as Q4_K_M; needs calibration text."""

from ml_collections import ConfigDict

SCHEMES = ("int4:g128", "int4:g64", "int4:g32", "int4:g32,asym", "int8:channel")


def get_config() -> ConfigDict:
    schemes = "".join(f'"{scheme}",' for scheme in SCHEMES)
    return ConfigDict({"passes": f"canonicalize,fuse_attention,budget{{bits=4.94,schemes=({schemes}),method=gptq}}"})
