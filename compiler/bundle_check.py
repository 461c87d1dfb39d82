"""What is checked before anything of a bundle is used. A failure is one BundleError that names the file."""

import datetime
import hashlib
import stat
from pathlib import Path

from jax import export
from tokenizers import Tokenizer

from xlathe import manifest as manifests
from xlathe.errors import BundleError, GraphFileError
from xlathe.graph_file import WeightFile
from xlathe.manifest import MANIFEST, PROGRAMS, TOKENIZER, WEIGHTS, ArrayType, FileEntry, Manifest


def replaceable(folder: Path) -> None:
    """Checks that a folder is missing, empty or holds nothing but a bundle, which may be damaged."""
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} is a file, expected a directory to write a bundle to")
    files = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    other = [file for file in files if not _is_of_a_bundle(file)]
    if files and not other and f'"{manifests.FORMAT}"'.encode() not in _bytes(folder / MANIFEST):
        other = [Path(MANIFEST)]
    if other:
        raise BundleError(
            f"{folder} is not replaced by a bundle: it holds {min(other)}, which is of no older bundle"
        )


def _is_of_a_bundle(file: Path) -> bool:
    program = file.parent == Path(PROGRAMS) and file.suffix == ".stablehlo"
    return program or str(file) in (MANIFEST, WEIGHTS, TOKENIZER)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest alone."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is no directory, expected a bundle written by Program.save")
    path = folder / MANIFEST
    try:
        return manifests.parse(_bytes(path).decode())
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: no text: {error}") from None
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None


def usable_here(folder: Path, manifest: Manifest) -> None:
    """Checks platform and date."""
    here = export.default_export_platform()
    if manifest.platform != here:
        raise BundleError(
            f"{folder} was compiled for {manifest.platform}, but this process runs on {here}: compile the "
            f"model again for {here}"
        )
    if datetime.datetime.now(datetime.UTC).date() > manifest.expires:
        raise BundleError(
            f"{folder} was built on {manifest.built} with jax {manifest.versions['jax']} and expired on "
            f"{manifest.expires}: build it again from the model, with xlathe.compile(...).save(...)"
        )


def sizes(folder: Path, manifest: Manifest) -> None:
    """Checks that every file is there and as long as it was."""
    for name, entry in manifest.files.items():
        size = _size(folder / name)
        if size != entry.size:
            raise BundleError(f"{folder / name} has {size} bytes, expected {entry.size}")


def hashes(folder: Path, manifest: Manifest, *, with_weights: bool) -> None:
    """Compares every byte to its hash; the weights, which may be large, only where asked."""
    for name, entry in manifest.files.items():
        if name != WEIGHTS or with_weights:
            found = file_entry(folder / name).sha256
            if found != entry.sha256:
                raise BundleError(
                    f"{folder / name} is damaged: SHA-256 {found[:16]}..., expected {entry.sha256[:16]}..."
                )


def file_entry(path: Path) -> FileEntry:
    """Returns size and hash of a file."""
    size = _size(path)
    try:
        with path.open("rb") as file:
            return FileEntry(size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from None


def weights(folder: Path, manifest: Manifest) -> WeightFile:
    """Opens the weights; checks names, order, dtypes and shapes. (The library checks sizes and offsets.)"""
    try:
        file = WeightFile.open(folder / WEIGHTS)
    except GraphFileError as error:
        raise BundleError(str(error)) from None
    found = tuple(ArrayType(name, dtype, shape) for name, (shape, dtype) in file.types.items())
    for here, expected in zip(found, manifest.inputs, strict=False):
        if here != expected:
            raise BundleError(f"{folder / WEIGHTS} has {_shown(here)} where {_shown(expected)} is expected")
    if len(found) != len(manifest.inputs):
        raise BundleError(f"{folder / WEIGHTS} has {len(found)} arrays, expected {len(manifest.inputs)}")
    return file


def tokenizer(folder: Path, manifest: Manifest) -> Tokenizer | None:
    """Reads the tokenizer, where there is one."""
    if TOKENIZER not in manifest.files:
        return None
    try:
        return Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{folder / TOKENIZER} is no tokenizer: {error}") from None


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is no file")
    return status.st_size


def _bytes(path: Path) -> bytes:
    _size(path)  # never blocks on what is no file
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from None


def _shown(array: ArrayType) -> str:
    return f"{array.name!r} {array.dtype}{list(array.shape)}"
