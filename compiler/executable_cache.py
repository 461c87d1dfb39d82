"""Executables of XLA, kept on disk from one process to the next.

They lie in the user's cache folder and not in the bundle: a bundle is copied from machine to machine, and
whoever unpacks one owns all its files, also those that a stranger put in. An executable is machine code: its
folder and its file have to belong to the user of the process, and neither may be writable by others. An entry
is named by the hash of the program and of what it was compiled for, and starts with the SHA-256 of the rest.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.extend import backend

LARGEST = 1 << 30  # bytes that all entries together may have; the least recently used go first
_SUFFIX, _DIGEST = ".executable", 32


def load_or_compile(program_sha256: str, compile_program: Callable[[], jax.stages.Compiled]) -> Any:
    """Returns the executable of a program: from the cache where it is there, else compiled and put there.

    A cache that cannot be read, written or trusted only costs time.
    """
    folder = _trusted_folder()
    if folder is None:
        return compile_program().runtime_executable()
    path = folder / f"{_key(program_sha256)}{_SUFFIX}"
    executable = _load(path)
    if executable is None:
        executable = compile_program().runtime_executable()
        _store(path, executable)
    return executable


def cache_folder() -> Path:
    """Returns `xlathe/executables` in `$XDG_CACHE_HOME` or `~/.cache`; raises RuntimeError without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "xlathe" / "executables"


def _trusted_folder() -> Path | None:
    """Makes the cache folder, for its user alone; None where there cannot be one that is to be trusted."""
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    if _is_ours(status) and stat.S_ISDIR(status.st_mode):
        return folder
    logging.log_first_n(logging.WARNING, "%s is not used: it is open to other users", 1, folder)
    return None


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _key(program_sha256: str) -> str:
    """Names an entry by what its machine code depends on."""
    client = backend.get_backend()
    device = jax.devices()[0]
    parts = (
        program_sha256,
        client.platform,
        client.platform_version,
        device.device_kind,
        importlib.metadata.version("jaxlib"),
        os.environ.get("XLA_FLAGS", ""),
        _machine(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _machine() -> str:
    """The processor's model and features; a name of the machine where they cannot be known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _load(path: Path) -> Any:
    content = _read(path)
    if content is None:
        return None
    digest, serialized = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(serialized).digest() != digest:
        return None
    try:
        return backend.get_backend().deserialize_executable(serialized, tuple(jax.devices()[:1]))
    except jax.errors.JaxRuntimeError as error:
        logging.warning("%s cannot be loaded and is compiled again: %s", path, error)
        return None


def _read(path: Path) -> bytes | None:
    """Reads a file that is ours; checks the file that it opened, so that it cannot be swapped in between."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not (stat.S_ISREG(status.st_mode) and _is_ours(status)):
                return None
            os.utime(descriptor)  # as used now
            return file.read()
    except OSError:
        return None


def _store(path: Path, executable: Any) -> None:
    try:
        serialized = executable.serialize()
        with tempfile.NamedTemporaryFile(dir=path.parent, delete_on_close=False) as file:
            file.write(hashlib.sha256(serialized).digest() + serialized)
            file.close()
            os.replace(file.name, path)
        _evict(path.parent)
    except (OSError, jax.errors.JaxRuntimeError) as error:
        logging.warning("%s was not written: %s", path, error)


def _evict(folder: Path) -> None:
    entries = [(path, path.stat()) for path in folder.iterdir()]
    total = 0
    for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime, reverse=True):
        total += status.st_size
        if total > LARGEST:
            path.unlink(missing_ok=True)
