"""The encoder of blocks that can run in this process."""

import numpy as np

from xlathe.kernels import native
from xlathe.kernels.gguf_blocks import cpu, reference


def encode_rows(rows: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Returns the blocks of rows by the kernel or, where it was not built, by the reference; as `cpu.encode`."""
    encoder = reference.encode if native.unusable() else cpu.encode
    return encoder(rows, type, importance)
