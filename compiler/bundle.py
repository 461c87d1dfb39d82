"""Bundles: compiled programs on disk, served without the model's source.

    manifest.json                          what is in it, for which machine, until when; hashes of all files
    weights.safetensors                    the arrays as the programs take them
    tokenizer.json                         where the program has one
    programs/<name>.stablehlo              one exported program a bucket; weights are arguments
    programs/<name>.reference.stablehlo    the same without kernels, where the former calls kernels

Programs are code, whatever is checked: load bundles of people whose code you would run.
"""

import datetime
import importlib.metadata
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from xlathe import bundle_check as check
from xlathe.aot import Signature, served_state, units
from xlathe.errors import BundleError, CheckpointError, OptionError, XlatheError, as_path, did_you_mean
from xlathe.exported import PALLAS_CALLS, custom_calls, export_unit, load_program
from xlathe.graph import Graph
from xlathe.graph_file import WeightFile
from xlathe.kernels import native
from xlathe.manifest import (
    LIBRARIES,
    LIFETIME,
    MANIFEST,
    PROGRAMS,
    TOKENIZER,
    WEIGHTS,
    ArrayType,
    Manifest,
    program_path,
    to_text,
)
from xlathe.offline import runs_here
from xlathe.program import Program
from xlathe.safetensors_file import Tensor, write_safetensors
from xlathe.target import find_target

PathLike = str | os.PathLike[str]


def save_bundle(program: Program, directory: PathLike) -> None:
    """Writes a bundle, whole or not at all; an older bundle in its place is replaced.

    Raises BundleError where the directory holds anything else, where the program itself was loaded from a
    bundle, or where it cannot be written.
    """
    if program.step is None:
        raise BundleError("a program that was loaded from a bundle cannot be saved again: copy its directory")
    folder = as_path(directory, BundleError).resolve()
    check.replaceable(folder)
    fresh, old = (folder.with_name(f".{folder.name}.{role}-{uuid.uuid4().hex}") for role in ("new", "old"))
    try:
        (fresh / PROGRAMS).mkdir(parents=True)
        _write(program, program.step, fresh)
        _replace(folder, fresh, old)
    except CheckpointError as error:
        raise BundleError(str(error)) from None
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load_bundle(directory: PathLike, *, verify: str = "structure") -> Program:
    """Reads what `Program.save` wrote; needs neither the model's source nor its library.

    verify: `structure` checks the manifest, platform and date, the sizes of all files, the types of all
    arrays, and every byte of the programs and the tokenizer; `all` also checks every byte of the weights.

    Raises BundleError, which names the file, what was expected and what was found.
    """
    if verify not in ("structure", "all"):
        raise OptionError(f"load: no verify={verify!r}{did_you_mean(str(verify), ['structure', 'all'])}")
    start = time.perf_counter()
    folder = as_path(directory, BundleError)
    manifest = check.read_manifest(folder)
    check.usable_here(folder, manifest)
    check.sizes(folder, manifest)
    check.hashes(folder, manifest, with_weights=verify == "all")
    weights = check.weights(folder, manifest)
    tokenizer = check.tokenizer(folder, manifest)
    reference = not _has_kernels(manifest)
    return Program(
        calls={s.name: _load_program(folder, manifest, s, reference) for s in manifest.signatures()},
        arrays={name: jnp.asarray(weights[name]) for name in weights},
        state_avals={rows: {s.name: s.aval for s in states} for rows, states in manifest.states.items()},
        buckets=manifest.buckets,
        vocab=manifest.vocab,
        tokenizer=tokenizer,
        stop_tokens=manifest.stop_tokens,
        target=manifest.target,
        card=manifest.card,
        memory=manifest.memory,
        seconds=time.perf_counter() - start,
    )


def _write(program: Program, step: Graph, folder: Path) -> None:
    _write_weights(program, folder / WEIGHTS)
    calls = _write_programs(program, step, folder)
    if program.tokenizer is not None:
        program.tokenizer.save(str(folder / TOKENIZER))
    inputs = WeightFile.open(folder / WEIGHTS).types
    files = [path for path in folder.rglob("*") if path.is_file()]
    today = datetime.datetime.now(datetime.UTC).date()
    manifest = Manifest(
        built=today,
        expires=today + LIFETIME,
        versions={library: importlib.metadata.version(library) for library in LIBRARIES},
        target=program.target,
        platform=find_target(program.target).platform,
        vocab=program.vocab,
        buckets=program.buckets,
        stop_tokens=tuple(map(int, program.stop_tokens)),
        inputs=tuple(ArrayType(name, dtype, shape) for name, (shape, dtype) in inputs.items()),
        states={rows: _state_types(program, step, rows) for rows in program.buckets.batches},
        custom_calls=tuple(sorted(calls)),
        memory=program.memory,
        files={path.relative_to(folder).as_posix(): check.file_entry(path) for path in files},
        card=program.card,
    )
    (folder / MANIFEST).write_bytes(to_text(manifest).encode())


def _state_types(program: Program, step: Graph, rows: int) -> tuple[ArrayType, ...]:
    avals = served_state(step, program.buckets, rows, program.speculation)
    return tuple(ArrayType.of(name, aval) for name, aval in avals.items())


def _write_weights(program: Program, path: Path) -> None:
    def tensor(array: Any) -> Tensor:
        return Tensor(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))

    write_safetensors(path, {name: tensor(array) for name, array in program.arrays.items()})


def _write_programs(program: Program, step: Graph, folder: Path) -> set[str]:
    """Writes every program, and returns the kernels that they call."""
    platform = find_target(program.target).platform
    called: set[str] = set()
    for unit in units(step, program.buckets, program.target, speculation=program.speculation):
        exported = export_unit(unit, platform)
        called |= custom_calls(exported)
        (folder / program_path(unit.signature.name)).write_bytes(exported.serialize())
    plain = units(step, program.buckets, program.target, kernels=False, speculation=program.speculation)
    for unit in plain if called else ():
        path = folder / program_path(unit.signature.name, reference=True)
        path.write_bytes(export_unit(unit, platform).serialize())
    return called


def _replace(folder: Path, fresh: Path, old: Path) -> None:
    """Puts `fresh` in the place of `folder`; what was there is gone only when that is done."""
    if not folder.exists():
        fresh.rename(folder)
        return
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _has_kernels(manifest: Manifest) -> bool:
    """Says whether this process can run the kernels that programs call; where it cannot, warns of that once."""
    reason = _why_no_kernels(manifest)
    if reason is not None:
        logging.log_first_n(logging.WARNING, "reference programs run, which are slower: %s", 1, reason)
    return reason is None


def _why_no_kernels(manifest: Manifest) -> str | None:
    called = set(manifest.custom_calls)
    unknown = called - set(native.TARGETS) - PALLAS_CALLS
    if unknown:
        return f"this version of xlathe has no {', '.join(sorted(unknown))}"
    if called & PALLAS_CALLS and not runs_here(find_target(manifest.target)):
        return f"kernels were written for {manifest.target}, and this is another device"
    try:
        if called & set(native.TARGETS):
            native.register()
    except XlatheError as error:
        return str(error)
    return None


def _load_program(
    folder: Path, manifest: Manifest, signature: Signature, reference: bool
) -> Callable[..., Any]:
    name = program_path(signature.name, reference=reference)
    try:
        return load_program((folder / name).read_bytes(), signature)
    except BundleError as error:
        written_by = f"it was written on {manifest.built} with jax {manifest.versions['jax']}"
        raise BundleError(f"{folder / name}: {error} ({written_by})") from error
