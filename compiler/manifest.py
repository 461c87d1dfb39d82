"""The manifest of a bundle: what is in it, for which machine, and until when it can be used."""

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from xlathe import card as cards
from xlathe.aot import Buckets, Signature, signatures
from xlathe.card import Card
from xlathe.errors import BundleError, OptionError
from xlathe.memory import CacheSize, MemoryPlan
from xlathe.safetensors_file import CODES

FORMAT, VERSION = "xlathe-bundle", 2
MANIFEST, WEIGHTS, TOKENIZER, PROGRAMS = "manifest.json", "weights.safetensors", "tokenizer.json", "programs"
LIFETIME = datetime.timedelta(days=180)  # `jax.export` promises to read what it wrote for six months
_DTYPES = frozenset(dtype.name for dtype in CODES)
_LARGEST = 2**48  # beyond every size that memory or a disk has
LIBRARIES = ("xlathe", "jax", "jaxlib")


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """Name, dtype and shape of an array."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(name: str, array: Any) -> "ArrayType":
        return ArrayType(name, jnp.dtype(array.dtype).name, tuple(map(int, array.shape)))

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    versions: of the libraries that wrote it; target: a name from `xlathe.target`; platform: XLA's name of it;
    inputs: the arrays of the weight file, in its order; states: what is remembered, by number of rows; memory: what
    the programs take of the target;
    custom_calls: the FFI targets that the programs need (the reference programs need none); files: by path
    inside the bundle, the manifest itself left out; card: what the model's checkpoint said, where it was one.
    """

    built: datetime.date
    expires: datetime.date
    versions: Mapping[str, str]
    target: str
    platform: str
    vocab: int
    buckets: Buckets
    stop_tokens: tuple[int, ...]
    inputs: tuple[ArrayType, ...]
    states: Mapping[int, tuple[ArrayType, ...]]
    custom_calls: tuple[str, ...]
    memory: MemoryPlan
    files: Mapping[str, FileEntry]
    card: Card | None = None

    def signatures(self) -> Iterator[Signature]:
        """Yields the signature of each program."""
        weights = {i.name: i.aval for i in self.inputs}
        states = {rows: tuple(s.aval for s in state) for rows, state in self.states.items()}
        return signatures(self.buckets, self.vocab, weights, states)

    def expected_files(self) -> set[str]:
        """Returns the paths of all files that this bundle has to have."""
        names = [signature.name for signature in self.signatures()]
        programs = {program_path(name) for name in names}
        if self.custom_calls:
            programs |= {program_path(name, reference=True) for name in names}
        return {WEIGHTS, *programs, *({TOKENIZER} & set(self.files))}


def program_path(name: str, *, reference: bool = False) -> str:
    """Returns where in a bundle a program lies; a reference program calls no kernel."""
    return f"{PROGRAMS}/{name}{'.reference' if reference else ''}.stablehlo"


def to_text(manifest: Manifest) -> str:
    """Returns the manifest as JSON with a checksum over the rest of it."""
    fields = dataclasses.asdict(dataclasses.replace(manifest, card=None))
    fields |= {"built": manifest.built.isoformat(), "expires": manifest.expires.isoformat()}
    fields["card"] = cards.to_json(manifest.card)
    body = {"format": FORMAT, "version": VERSION, **fields}
    checksum = hashlib.sha256(_json(body).encode()).hexdigest()
    return _json({**body, "checksum": checksum})


def parse(text: str) -> Manifest:
    """Reads what `to_text` wrote. Raises BundleError, naming the field, where it is anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"no JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"it does not describe a bundle: expected format {FORMAT!r}")
    if data.get("version") != VERSION:
        raise BundleError(f"version is {_shown(data.get('version'))}, expected {VERSION}")
    manifest = _manifest(data)
    _check_files(manifest)
    if to_text(manifest) != text:
        raise BundleError("its checksum is wrong: it was changed or damaged after it was written")
    return manifest


def _check_files(manifest: Manifest) -> None:
    programs = manifest.buckets.programs
    if programs > len(manifest.files):
        raise BundleError(f"files lists {len(manifest.files)}, too few for {programs} programs")
    expected, found = manifest.expected_files(), set(manifest.files)
    if expected - found:
        raise BundleError(f"files does not list {min(expected - found)!r}")
    if found - expected:
        raise BundleError(f"files lists {min(found - expected)!r}, which is no part of a bundle")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def _manifest(data: Mapping[str, Any]) -> Manifest:
    buckets, target = _buckets(data), _field(data, "target", _is_name, "a name")
    manifest = Manifest(
        built=_date(data, "built"),
        expires=_date(data, "expires"),
        versions=_versions(data),
        target=target,
        platform=_field(data, "platform", _is_name, "a name"),
        vocab=_field(data, "vocab", _is_size, "a positive number"),
        buckets=buckets,
        stop_tokens=tuple(_field(data, "stop_tokens", _list_of(_is_count), "a list of token ids")),
        inputs=_array_types(data, "inputs"),
        states=_states(data),
        custom_calls=tuple(_field(data, "custom_calls", _list_of(_is_name), "a list of names")),
        memory=_memory(data, target, buckets),
        files=_files(data),
        card=_card(data),
    )
    if tuple(sorted(manifest.states)) != manifest.buckets.batches:
        raise BundleError(
            f"states are of {sorted(manifest.states)} rows, the programs of {manifest.buckets.batches}"
        )
    return manifest


def _buckets(data: Mapping[str, Any]) -> Buckets:
    buckets = _field(data, "buckets", _is_object, "an object")
    return Buckets(
        batches=_sizes(buckets, "batches"),
        chunks=_sizes(buckets, "chunks"),
        unit=_field(buckets, "unit", _is_size, "a positive number"),
        slots=_field(buckets, "slots", _is_size, "a positive number"),
        gamma=_field(buckets, "gamma", _is_count, "a number"),
    )


def _memory(data: Mapping[str, Any], target: str, buckets: Buckets) -> MemoryPlan:
    memory = _field(data, "memory", _is_object, "an object")
    cache = _field(memory, "cache", _is_object, "an object")
    return MemoryPlan(
        target=target,
        batch=max(buckets.batches),
        context=buckets.slots,
        weights=_field(memory, "weights", _is_count, "a number of bytes"),
        cache=CacheSize(
            row=_field(cache, "row", _is_count, "a number of bytes"),
            token=_field(cache, "token", _is_count, "a number of bytes"),
            page=_field(cache, "page", _is_size, "a positive number"),
        ),
        temporaries=_field(memory, "temporaries", _or_none(_is_count), "a number of bytes or null"),
        unknown=_field(memory, "unknown", _is_text, "a text"),
        memory=_field(memory, "memory", _or_none(_is_count), "a number of bytes or null"),
    )


def _field(data: Mapping[str, Any], name: str, fits: Callable[[Any], bool], expected: str) -> Any:
    if name not in data:
        raise BundleError(f"{name} is missing, expected {expected}")
    if not fits(data[name]):
        raise BundleError(f"{name} is {_shown(data[name])}, expected {expected}")
    return data[name]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 1000 and value.isprintable()


def _is_text(value: Any) -> bool:
    return value == "" or _is_name(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _date(data: Mapping[str, Any], name: str) -> datetime.date:
    text = _field(data, name, _is_name, "a date")
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise BundleError(f"{name} is {_shown(text)}, expected a date as in 2026-01-31") from None


def _sizes(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    sizes = tuple(_field(data, name, _list_of(_is_size), "a list of positive numbers"))
    if not sizes or sizes != tuple(sorted(set(sizes))):
        raise BundleError(f"{name} is {_shown(list(sizes))}, expected increasing numbers")
    return sizes


def _versions(data: Mapping[str, Any]) -> dict[str, str]:
    versions = _field(data, "versions", _is_object, "an object")
    return {library: _field(versions, library, _is_name, "a version") for library in LIBRARIES}


def _array_types(data: Mapping[str, Any], name: str) -> tuple[ArrayType, ...]:
    types = tuple(map(_array_type, _field(data, name, _list_of(_is_object), "a list of objects")))
    if len({array.name for array in types}) != len(types):
        raise BundleError(f"{name} has the same name twice")
    return types


def _array_type(data: Mapping[str, Any]) -> ArrayType:
    return ArrayType(
        _field(data, "name", _is_name, "a name"),
        _field(data, "dtype", lambda value: value in _DTYPES, "a dtype"),
        tuple(_field(data, "shape", _list_of(_is_count), "a list of sizes")),
    )


def _states(data: Mapping[str, Any]) -> dict[int, tuple[ArrayType, ...]]:
    states = _field(data, "states", _is_object, "an object")
    if not all(re.fullmatch("[1-9][0-9]{0,8}", rows) for rows in states):
        raise BundleError(f"states has the keys {_shown(list(states))}, expected numbers of rows")
    return {int(rows): _array_types(states, rows) for rows in states}


def _card(data: Mapping[str, Any]) -> Card | None:
    try:
        return cards.from_json(data.get("card"))
    except OptionError as error:
        raise BundleError(str(error)) from None


def _files(data: Mapping[str, Any]) -> dict[str, FileEntry]:
    files = _field(data, "files", _is_object, "an object")
    entries = {name: _field(files, name, _is_object, "an object") for name in files}
    return {
        name: FileEntry(
            _field(entry, "size", _is_count, "a number of bytes"),
            _field(entry, "sha256", _is_sha256, "64 hexadecimal digits"),
        )
        for name, entry in entries.items()
    }
