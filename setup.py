"""Packages and the native library; everything declarative is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {
    "xlathe": "compiler",
    "xlathe.passes": "passes",
    "xlathe.models": "models",
    "xlathe.configs": "configs",
    "xlathe.tools": "tools",
}


def packages() -> list[str]:
    """Every folder with an `__init__.py`, under the name it is imported by."""
    return [
        package
        for name, folder in FOLDERS.items()
        for package in [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
    ]


setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={
        "": ["*.cc", "*.h", "*.json"],
        "xlathe.models": ["demo/*.safetensors", "demo/*.json"],
    },
)
