"""The library of the kernels in a process: used where it fits, and else told once and done without."""

import shutil
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest

from xlathe.kernels import native

INCLUDE = Path(jaxlib.__file__).parent / "include"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
NEWER = """
#include "xla/ffi/api/c_api.h"
// What a handler compiled with the next version of the headers says when it is registered.
extern "C" XLA_FFI_Error* KERNEL(XLA_FFI_CallFrame* frame) {
  auto* extension = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start);
  extension->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  extension->metadata->api_version.minor_version = XLA_FFI_API_MINOR + 1;
  return nullptr;
}
"""
LOWER_TWICE = """
import sys
from pathlib import Path
from xlathe.kernels import native
from xlathe.lower import kernels_of
from xlathe.target import find_target
native.library = lambda: Path(sys.argv[1])
print([len(kernels_of(find_target("cpu"))) for _ in range(2)])
"""


def lowered_with(library: Path) -> tuple[str, list[str]]:
    """What lowering prints, and the warnings, in a process with this library."""
    done = subprocess.run([sys.executable, "-c", LOWER_TWICE, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), [line for line in done.stderr.splitlines() if "reference bodies run" in line]


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_a_library_of_newer_headers_is_done_without(tmp_path: Path) -> None:
    source, library = tmp_path / "newer.cc", tmp_path / "newer.so"
    symbols = [target.replace(".", "_") for target in native.TARGETS]
    source.write_text("".join(f"#define KERNEL {name}\n{NEWER}\n#undef KERNEL\n" for name in symbols))
    command = [COMPILER, "-shared", "-fPIC", f"-isystem{INCLUDE}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    printed, warnings = lowered_with(library)
    assert printed == "[0, 0]"
    (warning,) = warnings
    assert f"{library} does not fit jaxlib {jaxlib.__version__}" in warning and "make clean install" in warning


def test_a_library_that_is_none_is_done_without(tmp_path: Path) -> None:
    library = tmp_path / "damaged.so"
    library.write_bytes(b"something else")
    printed, warnings = lowered_with(library)
    assert printed == "[0, 0]"
    (warning,) = warnings
    assert f"{library} cannot be loaded" in warning


@pytest.mark.skipif(native.library() is None, reason="built without a C++ compiler")
def test_the_library_that_was_built_is_usable() -> None:
    assert native.unusable() is None
    assert "portable" in native.available_isas()
