"""The public names of the package: imported when they are used, and no module hides one of them."""

import inspect
import subprocess
import sys

import pytest

import xlathe as xl


def last_line(code: str) -> str:
    """What a fresh process prints at the end."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_package_alone_does_not_import_jax() -> None:
    code = "import sys, xlathe as xl; dir(xl); xl.__all__; xl.OptionError; print('jax' in sys.modules)"
    assert last_line(code) == "False"


def test_every_public_name_is_there_and_listed() -> None:
    assert last_line("import xlathe as xl; print(sorted(set(xl.__all__) - set(dir(xl))))") == "[]"
    assert not any(inspect.ismodule(getattr(xl, name)) for name in xl.__all__)


@pytest.mark.parametrize("name", ["trace", "op"])
def test_a_function_is_not_hidden_by_its_module(name: str) -> None:
    code = f"import xlathe.{name}, xlathe as xl; from xlathe import {name} as f; print(f is xl.{name}, callable(f))"
    assert last_line(code) == "True True"


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="module 'xlathe' has no attribute 'tracee'"):
        xl.tracee  # noqa: B018
    assert not hasattr(xl, "nonsense")
    from xlathe import passes, verify

    assert inspect.ismodule(passes) and inspect.ismodule(verify)
