"""The shared library of the CPU kernels: where it is, and its FFI targets.

The library is compiled when the package is built, from every `.cc` file below this folder. Where there was no
C++ compiler it is missing, and programs run on the reference bodies of their operations.
"""

import ctypes
import functools
from pathlib import Path

import jax
import jaxlib

from xlathe.errors import XlatheError

# FFI targets that a compiled program may name. The C++ symbol has "_" for ".".
TARGETS = (
    "xlathe.quantized_dot.int8",
    "xlathe.quantized_dot.int4",
    "xlathe.quantized_dot.int4_a8",
    "xlathe.quantized_dot.blocks",
    "xlathe.quantized_ragged_dot.int8",
    "xlathe.quantized_ragged_dot.int4",
    "xlathe.quantized_ragged_dot.blocks",
    "xlathe.cached_attention.f32",
    "xlathe.cached_attention.int8",
    "xlathe.gguf_blocks",
)
_REBUILD = "run `make clean install` in the checkout, or `pip install --force-reinstall --no-deps xlathe`"


def library() -> Path | None:
    """Path of the shared library, or None where the package was built without a C++ compiler."""
    path = Path(__file__).with_name("libxlathe_cpu.so")
    return path if path.exists() else None


def unusable() -> str | None:
    """Returns why the kernels cannot run in this process, and what helps; None where they can."""
    try:
        register()
    except XlatheError as error:
        return str(error)
    return None


@functools.cache
def register() -> None:
    """Makes `TARGETS` known to XLA in this process. Calling it again does nothing.

    Raises XlatheError where the library is missing, was compiled from other sources, or with FFI headers that this
    jaxlib is too old for.
    """
    loaded = _load()
    jax.devices("cpu")  # until this backend exists registering is put off, and what fails then is the backend
    for target in TARGETS:
        symbol = getattr(loaded, target.replace(".", "_"), None)
        if symbol is None:
            raise XlatheError(f"{library()} has no kernel {target!r}: {_REBUILD}")
        try:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform="cpu")
        except jax.errors.JaxRuntimeError as error:  # such as the version of the FFI headers
            raise XlatheError(f"{library()} does not fit jaxlib {jaxlib.__version__}, {error}: {_REBUILD}") from None


def available_isas() -> tuple[str, ...]:
    """Returns the instruction sets that the kernels can use on this CPU, best first, as `("avx2", "portable")`.

    Raises XlatheError where there is no library that can be loaded.
    """
    names = _load().xlathe_available_isas
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split())


def _load() -> ctypes.CDLL:
    path = library()
    if path is None:
        raise XlatheError("the CPU kernels were not built: install xlathe again where there is a C++ compiler")
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise XlatheError(f"{path} cannot be loaded, {error}: {_REBUILD}") from None
