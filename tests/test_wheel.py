"""The built wheel holds everything: an editable install would hide what is missing from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from xlathe.kernels import native

ROOT = Path(__file__).parent.parent
FOLDERS = {"compiler": "xlathe"} | {
    name: f"xlathe.{name}" for name in ("passes", "models", "configs", "tools")
}
IMPORT_ALL = """
import importlib, sys
import xlathe
assert xlathe.__file__.startswith(sys.argv[1]), xlathe.__file__
for module in sys.argv[2:]:
    importlib.import_module(module)
"""

# models are their authors' code wherever they lie: errors name their lines
SOURCE_LINE = """
import os, sys, jax
from xlathe import jaxpr, models
assert models.__file__.startswith(sys.argv[1]), models.__file__
path = os.path.join(os.path.dirname(models.__file__), "anyones.py")
scope = {}
exec(compile("def model(x):\\n    return x + 1\\n", path, "exec"), scope)
(eqn,) = jax.make_jaxpr(scope["model"])(1.0).eqns
assert f"{path}:2 (model)" in jaxpr.source_line(eqn), jaxpr.source_line(eqn)
"""


def modules() -> list[str]:
    """The name of every module in the checkout."""
    paths = [
        (folder, path.relative_to(ROOT / folder))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    ]
    return sorted(
        {".".join([FOLDERS[f], *p.with_suffix("").parts]).removesuffix(".__init__") for f, p in paths}
    )


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    env = os.environ | environment
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing built earlier in the checkout finds its way into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, source, cwd=folder, CXXFLAGS="-O0")  # the kernels are built, and not run
    return next(folder.glob("*.whl"))


def test_every_module_is_imported_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path,
        wheel,
        cwd=tmp_path,
    )
    script = tmp_path / "import_all.py"
    script.write_text(IMPORT_ALL)
    run(script, str(tmp_path), *modules(), cwd=tmp_path)
    script.write_text(SOURCE_LINE)
    run(script, str(tmp_path), cwd=tmp_path)


def test_wheel_holds_every_file(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    kinds = {".py", ".cc", ".h", ".json", ".safetensors"}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kinds:
                name = package.replace(".", "/") + "/" + path.relative_to(ROOT / folder).as_posix()
                assert name in inside
    assert ("xlathe/kernels/libxlathe_cpu.so" in inside) == (native.library() is not None)


def test_wheel_is_for_this_platform_and_any_python(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
