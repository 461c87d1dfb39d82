"""The best mix of llama.cpp's types that have kernels, in as many bits a weight as Q4_K_M; needs calibration text."""

from ml_collections import ConfigDict

SCHEMES = ("q4_0", "q4_k", "q5_k", "q6_k", "q8_0")


def get_config() -> ConfigDict:
    schemes = "".join(f'"{scheme}",' for scheme in SCHEMES)
    return ConfigDict({"passes": f"canonicalize,fuse_attention,budget{{bits=4.94,schemes=({schemes})}}"})
