"""Compiled programs come from the cache only where it is whole and the user's own."""

import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from xlathe import executable_cache
from xlathe.executable_cache import cache_folder, load_or_compile

PROGRAM = hashlib.sha256(b"a program").hexdigest()


class Compiler:
    """Compiles x -> x + 1, in place, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> jax.stages.Compiled:
        self.calls += 1
        return jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.zeros(3)).compile()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


@pytest.fixture
def compiler(cache: Path) -> Compiler:
    """A compiler that has filled the cache."""
    compiler = Compiler()
    load_or_compile(PROGRAM, compiler)
    (entry,) = cache.iterdir()
    assert (
        compiler.calls == 1
        and entry.stat().st_mode & 0o777 == 0o600
        and cache.stat().st_mode & 0o777 == 0o700
    )
    return compiler


def test_an_entry_runs_as_what_was_compiled(compiler: Compiler) -> None:
    executable = load_or_compile(PROGRAM, compiler)
    given = jnp.arange(3.0)
    ((result,),) = executable.execute_sharded([given]).disassemble_into_single_device_arrays()
    assert compiler.calls == 1
    assert result.tolist() == [1, 2, 3] and given.is_deleted()


def test_other_programs_and_flags_have_other_entries(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_compile(hashlib.sha256(b"another").hexdigest(), compiler)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    load_or_compile(PROGRAM, compiler)
    assert compiler.calls == 3


@pytest.mark.parametrize("position", [0, 31, 32, 1000, -1])
def test_a_damaged_entry_is_compiled_again(cache: Path, compiler: Compiler, position: int) -> None:
    (entry,) = cache.iterdir()
    content = bytearray(entry.read_bytes())
    content[position] ^= 1
    entry.write_bytes(content)
    load_or_compile(PROGRAM, compiler)
    load_or_compile(PROGRAM, compiler)
    assert compiler.calls == 2


@pytest.mark.parametrize(
    "content", [b"", b"short", hashlib.sha256(b"no executable").digest() + b"no executable"]
)
def test_what_is_no_executable_is_compiled_again(cache: Path, compiler: Compiler, content: bytes) -> None:
    (entry,) = cache.iterdir()
    entry.write_bytes(content)
    load_or_compile(PROGRAM, compiler)
    assert compiler.calls == 2


def test_an_entry_open_to_others_is_not_loaded(cache: Path, compiler: Compiler) -> None:
    (entry,) = cache.iterdir()
    entry.chmod(0o620)
    load_or_compile(PROGRAM, compiler)
    load_or_compile(PROGRAM, compiler)
    assert compiler.calls == 2 and entry.stat().st_mode & 0o777 == 0o600


def test_a_linked_entry_is_not_loaded(cache: Path, compiler: Compiler, tmp_path: Path) -> None:
    (entry,) = cache.iterdir()
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    load_or_compile(PROGRAM, compiler)
    assert compiler.calls == 2 and not entry.is_symlink()


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_open_to_others_is_not_used(cache: Path, compiler: Compiler, mode: int) -> None:
    cache.chmod(mode)
    load_or_compile(PROGRAM, compiler)
    load_or_compile(PROGRAM, compiler)
    assert compiler.calls == 3


def test_a_folder_of_another_user_is_not_used(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    load_or_compile(PROGRAM, compiler)
    assert compiler.calls == 2


def test_no_folder_can_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiler = Compiler()
    assert load_or_compile(PROGRAM, compiler) is not None and compiler.calls == 1


def test_the_least_recently_used_entries_go(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = cache.iterdir()
    os.utime(first, (1, 1))
    monkeypatch.setattr(executable_cache, "LARGEST", first.stat().st_size * 3 // 2)
    load_or_compile(hashlib.sha256(b"another").hexdigest(), compiler)
    (second,) = cache.iterdir()
    assert second != first
