"""The layouts and schemes that are compared with the tools they come from; shared by our environment and theirs."""

import dataclasses
import zlib

import numpy as np

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKENS = np.random.RandomState(0).randint(0, 64, (2, 20))
SIZE, GROUP = 64, 32  # of the one module, [n, k] alike


@dataclasses.dataclass(frozen=True)
class Case:
    """scheme: ours; layout: of the directory that is written; tied: whether the head is the embedding; floats: a
    projection that stays in floats in all layers."""

    layout: str
    scheme: str
    tied: bool = False
    floats: str = ""

    @property
    def name(self) -> str:
        left = f", {self.floats} in floats" if self.floats else ""
        return f"{self.layout} {self.scheme}{', tied' if self.tied else ''}{left}"


MODELS = (
    Case("gptq", "int4:g32"),
    Case("gptq", "int8:g32"),
    Case("gptq", "int4:g32", floats="down"),
    Case("gptq_v2", "int4:g32,asym"),
    Case("awq", "int4:g32,asym"),
    Case("awq", "int4:g32", tied=True, floats="down"),
    Case("compressed-tensors", "int4:g32"),
    Case("compressed-tensors", "int4:g32,asym,s=f32"),  # unpacked as they are loaded, in the type of scales
    Case("compressed-tensors", "int8:channel"),
    Case("compressed-tensors", "int8:channel,a=int8_token"),
    Case("compressed-tensors", "fp8_e4m3:tensor"),
    Case("compressed-tensors", "fp8_e4m3:channel,a=fp8_token"),
    Case("compressed-tensors", "fp8_e4m3:b32x32"),
    Case("compressed-tensors", "int4:g32", tied=True),
)
"""Whole models, written by us and run by transformers."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of random codes. bits: of a code; group: inputs that share a scale, 0 for all; zeros: asymmetric."""

    layout: str
    bits: int
    group: int
    zeros: bool

    @property
    def name(self) -> str:
        return f"{self.layout} {self.bits} bits, groups of {self.group}, {'asym' if self.zeros else 'sym'}"

    def codes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns codes from 0 up [n, k], zero points from 1 up and float16 scales [n, groups]."""
        draw, last = np.random.RandomState(zlib.crc32(self.name.encode())), 2**self.bits - 1
        groups = SIZE // self.group if self.group else 1
        zeros = (
            draw.randint(1, last + 1, (SIZE, groups)) if self.zeros else np.full((SIZE, groups), 2 ** (self.bits - 1))
        )
        scales = draw.uniform(0.5, 1.5, (SIZE, groups)).astype(np.float16)
        return draw.randint(0, last + 1, (SIZE, SIZE)).astype(np.uint8), zeros.astype(np.uint8), scales

    def weight(self) -> np.ndarray:
        """Returns what the module stands for, float32 [n, k]: exact, as codes have 8 bits and scales 11."""
        codes, zeros, scales = (array.astype(np.float32) for array in self.codes())
        group = self.group or SIZE
        return (codes - np.repeat(zeros, group, axis=1)) * np.repeat(scales, group, axis=1)


MODULES = (
    *(Module("gptq", bits, GROUP, zeros) for bits in (2, 3, 4, 8) for zeros in (False, True)),
    Module("gptq", 4, 0, False),
    Module("awq", 4, GROUP, True),
    Module("awq", 4, 0, True),
    *(Module("compressed-tensors", bits, GROUP, zeros) for bits in (2, 3, 4, 8) for zeros in (False, True)),
    Module("compressed-tensors", 4, 0, True),
)
"""Single modules, packed and unpacked by the tools that the layouts come from."""
