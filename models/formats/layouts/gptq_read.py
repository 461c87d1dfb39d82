"""Reading GPTQ's layout, and AWQ's, which differs in what a word holds. Both forms: `gptq.py`, `awq.py`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.formats.layouts.awq import ORDER, straighten
from xlathe.models.formats.layouts.bits import WORD, count_words, to_bytes, unpack
from xlathe.models.formats.layouts.integers import NAMES, SCALES, derived, from_stream
from xlathe.models.formats.layouts.module import (
    FLOATS,
    INT32,
    Found,
    Module,
    group_of,
    matrix,
    refuse_unknown,
    split_modules,
)
from xlathe.models.settings import Settings
from xlathe.safetensors_file import Tensor
from xlathe.storage import Scaled
from xlathe.storage.elements import pack_bits

MARKS = ("qweight", "qzeros", "scales", "g_idx")
SUFFIXES = (*MARKS, "weight")
MADE_BY = (
    *("act_group_aware", "adapter", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs"),
    *("damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "dynamic", "exllama_config"),
    *("fail_safe", "failsafe", "hyb_act", "lm_head", "max_input_length", "meta", "method", "model_file_base_name"),
    *("model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
    *("mse", "offload_to_disk", "offload_to_disk_path", "pad_token_id", "parallel_packing", "quantizer"),
    *("static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "vram_strategy"),
)
"""Settings of GPTQ that say how codes were chosen, where they are, or how others run them."""
GPTQ = ("quant_method", "checkpoint_format", "format", "bits", "group_size", "sym", "desc_act", "pack_dtype", *MADE_BY)
AWQ_RUN = ("modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "backend")
AWQ = ("quant_method", "version", "bits", "w_bit", "group_size", "q_group_size", "zero_point", *AWQ_RUN)
LISTED = 3  # modules in a note
Unpacked = Callable[[np.ndarray], np.ndarray]
"""What reads zero points, uint8 [groups, n], out of words."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a configuration says. bits: of a code; group: inputs that share a scale, 0 for all; zeros: whether there are
    zero points; less_one: whether they are stored less one."""

    bits: int
    group: int
    zeros: bool
    less_one: bool


def read_gptq(settings: Settings, tensors: Mapping[str, Tensor], where: str) -> Found:
    """Returns matrices in place of modules. One whose inputs are not in the order of their groups (`desc_act`) has
    floats alone, and a note says so."""
    refuse_unknown(settings, GPTQ)
    settings.refuse("pack_dtype", unless="int32", why="expected words of int32")
    spelled = "checkpoint_format" if settings.has("checkpoint_format") else "format"
    version = settings.one_of(spelled, ("gptq", "gptq_v2"), "gptq")
    bits = _bits(settings, (2, 3, 4, 8))
    settings.flag("desc_act", False)
    form = Form(bits, group_of(settings), not settings.flag("sym", True), version == "gptq")
    _refuse_other_bits(settings)
    modules, others = _modules(where, tensors, MARKS)
    found = {f"{module.name}.weight": _gptq_matrix(module, form) for module in modules}
    floats = [name for name, tensor in found.items() if tensor.packed is None]
    return Found({**others, **found}, _told(floats))


def read_awq(settings: Settings, tensors: Mapping[str, Tensor], where: str) -> Found:
    """Returns matrices in place of modules."""
    settings = settings.with_defaults(
        bits=settings.values.get("w_bit"), group_size=settings.values.get("q_group_size"), version="gemm"
    )
    refuse_unknown(settings, AWQ)
    if str(settings.values["version"]).lower() != "gemm":
        raise settings.wrong("version", "gemm", settings.values["version"])
    settings.refuse("zero_point", unless=True, why="expected zero points, which the layout always holds")
    form = Form(_bits(settings, (4,)), group_of(settings), zeros=True, less_one=False)
    modules, others = _modules(where, tensors, ("qweight", "qzeros", "scales"))
    return Found({**others, **{f"{module.name}.weight": _awq_matrix(module, form) for module in modules}})


def _bits(settings: Settings, known: tuple[int, ...]) -> int:
    bits = settings.size("bits")
    if bits not in known:
        raise settings.wrong("bits", f"one of {', '.join(map(str, known))}", bits)
    return bits


def _refuse_other_bits(settings: Settings) -> None:
    """`dynamic` may leave modules out; other bits or groups for some of them have no reader here."""
    dynamic = settings.within("dynamic").values if settings.has("dynamic") else {}
    for pattern, changes in dynamic.items():
        if not pattern.startswith("-:") and changes:
            raise CheckpointError(
                f"{settings.where}: dynamic: {pattern!r}: expected the same form for all, found another"
            )


def _modules(
    where: str, tensors: Mapping[str, Tensor], known: Sequence[str]
) -> tuple[list[Module], dict[str, Tensor]]:
    """Returns the modules, which have tensors of these suffixes alone, and all other tensors."""
    modules, others = split_modules(where, tensors, SUFFIXES, MARKS)
    if not modules:
        raise CheckpointError(f"{where}: expected tensors *.qweight, as its quantization_config says, found none")
    for module in modules.values():
        module.refuse_others(known)
    return list(modules.values()), others


def _told(floats: list[str]) -> tuple[str, ...]:
    if not floats:
        return ()
    more = [f"and {len(floats) - LISTED} more"] if len(floats) > LISTED else []
    return (
        f"{', '.join([*floats[:LISTED], *more])}: groups of inputs that do not lie side by side (act-order) have no "
        "storage format; these weights are floats of the same values",
    )


def _gptq_matrix(module: Module, form: Form) -> Tensor:
    qweight = module.take("qweight", INT32, (None, None))
    n, k = qweight.shape[1], qweight.shape[0] * WORD // form.bits
    if k * form.bits != qweight.shape[0] * WORD:
        raise module.wrong("qweight", f"rows of words that {form.bits} bits fill", list(qweight.shape))
    scale, zero = _shared(module, form, n, k, lambda words: unpack(words, form.bits, n))
    order = _order(module, form, k, scale.shape[1])
    if order is not None:
        return _floats(module, form, (n, k), qweight, scale, zero, order)
    stored = _stored(form, scale)
    part = stored.parts(n, k)["codes"]
    codes = derived(part.shape, part.dtype, lambda words: from_stream(stored, to_bytes(words.T)), qweight)
    return matrix(stored, n, k, {"codes": codes, **_parts(form, scale, zero)})


def _stored(form: Form, scale: Tensor) -> Scaled:
    return Scaled(NAMES[form.bits], 1, form.group, SCALES[scale.dtype], "u8" if form.zeros else "")


def _awq_matrix(module: Module, form: Form) -> Tensor:
    qweight = module.take("qweight", INT32, (None, None))
    k, n = qweight.shape[0], qweight.shape[1] * len(ORDER)
    scale, zero = _shared(module, form, n, k, straighten)
    if k % (form.group or 2) or k % 2:
        raise module.wrong("qweight", f"inputs that groups of {form.group or 2} divide", k)
    codes = derived((n, k // 2), np.uint8, lambda words: pack_bits(straighten(words).T, form.bits), qweight)
    return matrix(_stored(form, scale), n, k, {"codes": codes, **_parts(form, scale, zero)})


def _shared(module: Module, form: Form, n: int, k: int, unpacked: Unpacked) -> tuple[Tensor, Tensor]:
    """Returns scales and zero points, [n, groups]; those of a form that has none must be the middle."""
    groups = -(-k // (form.group or k))
    scales = module.take("scales", FLOATS, (groups, n))
    qzeros = module.take("qzeros", INT32, (groups, count_words(n, form.bits)))
    middle = 2 ** (form.bits - 1)

    def zeros(words: np.ndarray) -> np.ndarray:
        found = unpacked(words)
        if form.less_one:
            found = (found + 1) & np.uint8(2**form.bits - 1)
        if not form.zeros and (found != middle).any():
            raise module.wrong("qzeros", f"{middle} everywhere, since sym is true", int(found[found != middle][0]))
        return np.ascontiguousarray(found.T)

    return (
        derived((n, groups), scales.dtype, lambda array: np.ascontiguousarray(array.T), scales),
        derived((n, groups), np.uint8, zeros, qzeros),
    )


def _parts(form: Form, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    """Returns the parts beside codes; zero points that a form lacks are read, and so checked, with the scales."""
    shape = scale.shape if form.group else scale.shape[:1]
    if form.zeros:
        shared = {"scale": scale, "zero": zero}
        return {name: derived(shape, t.dtype, lambda array: array.reshape(shape), t) for name, t in shared.items()}
    return {"scale": derived(shape, scale.dtype, lambda array, checked: array.reshape(shape), scale, zero)}


def _order(module: Module, form: Form, k: int, groups: int) -> np.ndarray | None:
    """Returns the group of each input, int32 [k], where groups are not each a run of `form.group` inputs."""
    plain = np.arange(k) // (form.group or k)
    if "g_idx" not in module.tensors:
        return None if not k % (form.group or k) else plain
    found = module.take("g_idx", INT32, (k,)).read()
    if found.min() < 0 or found.max() >= groups:
        raise module.wrong("g_idx", f"groups from 0 to {groups - 1}", [int(found.min()), int(found.max())])
    return None if (found == plain).all() and not k % (form.group or k) else found


def _floats(
    module: Module, form: Form, shape: tuple[int, int], qweight: Tensor, scale: Tensor, zero: Tensor, order: np.ndarray
) -> Tensor:
    def read(words: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        codes = unpack(words.T, form.bits, shape[1]).astype(np.float32)
        return (codes - zeros[:, order]) * scales[:, order].astype(np.float32)

    return derived(shape, np.float32, read, qweight, scale, zero)
