"""The shared library of the CPU kernels: where it is, and its FFI targets.

The library is compiled when the package is built, from every `.cc` file below this folder. Where there was no
C++ compiler it is missing, and programs run on the reference bodies of their operations.
"""

import ctypes
import functools
from pathlib import Path

import jax

from xlathe.errors import XlatheError

# FFI targets that a compiled program may name. The C++ symbol has "_" for ".".
TARGETS = ("xlathe.quantized_dot.int8", "xlathe.cached_attention.f32")


def library() -> Path | None:
    """Path of the shared library, or None where the package was built without a C++ compiler."""
    path = Path(__file__).with_name("libxlathe_cpu.so")
    return path if path.exists() else None


@functools.cache
def register() -> None:
    """Makes `TARGETS` known to XLA in this process. Calling it again does nothing.

    Raises:
      XlatheError: the library is missing or was compiled from other sources.
    """
    loaded = _load()
    for target in TARGETS:
        symbol = getattr(loaded, target.replace(".", "_"), None)
        if symbol is None:
            raise XlatheError(f"{library()} has no kernel {target!r}: install xlathe again to rebuild it")
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="cpu")


def available_isas() -> tuple[str, ...]:
    """Instruction sets that the kernels can use on this CPU, best first, such as `("avx2", "portable")`.

    Raises:
      XlatheError: the library is missing.
    """
    names = _load().xlathe_available_isas
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split())


def _load() -> ctypes.CDLL:
    path = library()
    if path is None:
        raise XlatheError(
            "the CPU kernels were not built: install xlathe again where there is a C++ compiler"
        )
    return ctypes.CDLL(str(path))
