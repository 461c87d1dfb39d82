"""Reading the layouts of compressed-tensors. What they look like, and writing: `compressed.py`."""

from collections.abc import Mapping

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.formats.layouts.bits import count_words, to_bytes, unpack
from xlathe.models.formats.layouts.compressed import FP8, PACKED
from xlathe.models.formats.layouts.compressed_config import Group, find_group, parse_groups, parse_targets
from xlathe.models.formats.layouts.integers import NAMES, SCALES, derived, from_stream
from xlathe.models.formats.layouts.module import FLOATS, INT32, Found, Module, matrix, split_modules
from xlathe.models.settings import Settings
from xlathe.safetensors_file import Tensor
from xlathe.storage import Scaled
from xlathe.storage.elements import pack_bits

SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
MARKS = ("weight_packed", "weight_scale")
CACHE = (".k_scale", ".v_scale", ".q_scale")


def read_compressed(settings: Settings, tensors: Mapping[str, Tensor], where: str) -> Found:
    """Returns matrices in place of modules. Notes tell of activations that are rounded as no scheme of ours does."""
    groups, ignored = parse_groups(settings), parse_targets(settings, "ignore")
    modules, others = split_modules(where, tensors, SUFFIXES, MARKS)
    if not modules:
        raise CheckpointError(f"{where}: expected tensors *.weight_scale, as its quantization_config says, found none")
    notes = dict.fromkeys(note for group in groups for note in group.notes)
    if settings.has("kv_cache_scheme"):
        others = {name: tensor for name, tensor in others.items() if not name.endswith(CACHE)}
        notes["kv_cache_scheme: what is remembered is stored as the pass cache_layout says"] = None
    found = {}
    for name, module in modules.items():
        group = None if ignored.match(name) else find_group(groups, name)
        if group is None:
            raise module.wrong("weight_scale", "none: `ignore`, or no target, leaves the module as it is", "one")
        found[f"{name}.weight"] = _matrix(module, group)
        module.refuse_others(_known(group))
    return Found({**others, **found}, tuple(notes))


def _known(group: Group) -> tuple[str, ...]:
    """Returns the suffixes of the tensors that a module of a group may have."""
    codes = ("weight_packed", "weight_shape") if group.format == PACKED else ("weight",)
    return (*codes, "weight_scale", *([] if group.symmetric else ["weight_zero_point"]), *group.steps)


def _matrix(module: Module, group: Group) -> Tensor:
    codes, n, k = (_packed if group.format == PACKED else _whole)(module, group)
    scale = _scale(module, group, n, k)
    stored = _stored(group, scale)
    if reason := stored.misfit(n, k):
        raise module.wrong("weight_scale", f"a form that weights [{n}, {k}] have", reason)
    shapes = stored.parts(n, k)
    parts = {"codes": derived(shapes["codes"].shape, shapes["codes"].dtype, lambda c: from_stream(stored, c), codes)}
    parts["scale"] = derived(shapes["scale"].shape, scale.dtype, lambda s: s.reshape(shapes["scale"].shape), scale)
    if stored.zero:
        parts["zero"] = _zero(module, group, n, shapes["zero"].shape)
    if group.activations in ("int8_static", "fp8_static"):
        step = _one(module, "input_scale")
        parts["input"] = derived((), np.float32, lambda s: s.astype(np.float32).reshape(()), step)
    return matrix(stored, n, k, parts, group.activations)


def _stored(group: Group, scale: Tensor) -> Scaled:
    element = FP8 if group.kind == "float" else NAMES[group.bits]
    return Scaled(element, group.rows, group.columns, SCALES[scale.dtype], "" if group.symmetric else "u8")


def _packed(module: Module, group: Group) -> tuple[Tensor, int, int]:
    """Returns the codes from 0 up, packed as bytes, and the shape [n, k] that the module says it has."""
    shape = module.take("weight_shape", (np.int64, np.int32), (2,)).read()
    words = module.take("weight_packed", INT32, (None, None))
    n, k = int(shape[0]), int(shape[1])
    if k < 1 or words.shape != (n, count_words(k, group.bits)):
        raise module.wrong("weight_packed", f"what weight_shape [{n}, {k}] takes", list(words.shape))
    width = k * group.bits // 8
    return derived((n, width), np.uint8, lambda array: to_bytes(array)[:, :width], words), n, k


def _whole(module: Module, group: Group) -> tuple[Tensor, int, int]:
    """Returns the codes of a weight that has an element for each; int8 with the middle added, as bytes."""
    if group.kind == "float":
        codes = module.take("weight", ("float8_e4m3fn",), (None, None))
        return codes, *codes.shape  # type: ignore[return-value]
    levels = module.take("weight", (np.int8,), (None, None))
    n, k = levels.shape
    middle, last = 2 ** (group.bits - 1), 2**group.bits - 1

    def stream(array: np.ndarray) -> np.ndarray:
        codes = array.astype(np.int16) + middle
        outside = array[(codes < 0) | (codes > last)]
        if outside.size:
            raise module.wrong("weight", f"whole numbers of {group.bits} bits", int(outside[0]))
        return codes.astype(np.uint8) if group.bits == 8 else pack_bits(codes.astype(np.uint8), group.bits)

    return derived((n, k * group.bits // 8), np.uint8, stream, levels), n, k


def _scale(module: Module, group: Group, n: int, k: int) -> Tensor:
    if not group.rows:
        return _one(module, "weight_scale")
    columns = -(-k // group.columns) if group.columns else 1
    return module.take("weight_scale", FLOATS, (-(-n // group.rows), columns))


def _one(module: Module, suffix: str) -> Tensor:
    """Returns a tensor of one number, [1], or [] as some writers have it."""
    scalar = suffix in module.tensors and not module.tensors[suffix].shape
    return module.take(suffix, FLOATS, () if scalar else (1,))


def _zero(module: Module, group: Group, n: int, shape: tuple[int, ...]) -> Tensor:
    """Zero points are packed along outputs."""
    groups = shape[1] if len(shape) > 1 else 1
    words = module.take("weight_zero_point", INT32, (count_words(n, group.bits), groups))

    def read(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(unpack(array.T, group.bits, n).T).reshape(shape)

    return derived(shape, np.uint8, read, words)
