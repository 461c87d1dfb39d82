"""The packages and the native library; everything that can be declared is in pyproject.toml."""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDERS = {
    "xlathe": "compiler",
    "xlathe.passes": "passes",
    "xlathe.models": "models",
    "xlathe.configs": "configs",
    "xlathe.tools": "tools",
}
KERNELS = Path("compiler/kernels")


def packages() -> list[str]:
    """Every folder with an `__init__.py`, under the name it is imported by."""
    return [
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ]


def native_library() -> Extension:
    """All CPU kernels in one library. It is optional: where it does not compile, setup goes on without it."""
    jaxlib = importlib.util.find_spec("jaxlib")
    headers = [f"-isystem{folder}/include" for folder in (jaxlib and jaxlib.submodule_search_locations) or []]
    flags = os.environ.get("CXXFLAGS", "").split()  # last, so that whoever builds has the last word
    return Extension(
        "xlathe.kernels.libxlathe_cpu",
        sources=sorted(map(str, KERNELS.rglob("*.cc"))),
        depends=sorted(map(str, KERNELS.rglob("*.h"))),
        include_dirs=[str(KERNELS)],
        # No -march: a kernel picks its instruction set at run time. No contraction: each rounding is written.
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", *headers, *flags],
        language="c++",
        optional=True,
    )


class BuildLibrary(build_ext):
    """Builds a plain shared library, which no version of Python has its name in."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# The compiler that Python itself was built with need not be on this machine.
compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
if compiler is not None:
    os.environ.setdefault("CC", compiler)
    os.environ.setdefault("CXX", compiler)

setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={
        "": ["*.cc", "*.h", "*.json", "py.typed"],
        "xlathe.models": ["demo/*.safetensors", "demo/*.json"],
    },
    ext_modules=[native_library()],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
