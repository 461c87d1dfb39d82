"""What a `quantization_config` of compressed-tensors says: groups of modules, and how each is stored."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xlathe.errors import CheckpointError, brief
from xlathe.models.formats.layouts.compressed import FLOAT, MIXED, PACKED, WHOLE
from xlathe.models.formats.layouts.module import group_of, refuse_unknown
from xlathe.models.settings import Settings

FORMATS = (PACKED, WHOLE, FLOAT, "naive-quantized")
WHOLE_KEYS = (
    *("quant_method", "format", "config_groups", "ignore", "quantization_status", "kv_cache_scheme"),
    *("global_compression_ratio", "version", "provider"),
)
GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
ARGUMENTS = (
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)
KINDS = {"int8": "int", "fp8": "float"}
STEPS: Mapping[str, Mapping[str, Any]] = {
    "token": {"strategy": "token", "dynamic": True},
    "static": {"strategy": "tensor", "dynamic": False},
}
ROUNDED = {(kind, step): {"type": KINDS[kind], **STEPS[step]} for kind in KINDS for step in STEPS}
"""How activations are rounded, by the two halves of the names that we have for it."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """Names of modules, regular expressions (after `re:` in files), and classes: all that is stored here is linear."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def match(self, module: str) -> str | None:
        """Says by what a module is matched, "name", "pattern" or "class"; None where it is not."""
        if module in self.names:
            return "name"
        if any(pattern.match(module) for pattern in self.patterns):
            return "pattern"
        return "class" if "Linear" in self.names else None


@dataclasses.dataclass(frozen=True)
class Group:
    """How the modules that targets match are stored.

    rows, columns: of the block that shares a scale, as in `Scaled`; activations: None or one of `ACTIVATIONS`; steps:
    the tensors in which activations may have theirs; notes: what of a configuration is done otherwise.
    """

    targets: Targets
    format: str
    kind: str
    bits: int
    symmetric: bool
    rows: int
    columns: int
    activations: str | None
    steps: tuple[str, ...]
    notes: tuple[str, ...]


def parse_groups(settings: Settings) -> list[Group]:
    """Returns the groups in order. Raises CheckpointError, naming the setting, for what is unknown or has no reader."""
    refuse_unknown(settings, WHOLE_KEYS)
    groups = settings.within("config_groups")
    if not groups.values:
        raise settings.wrong("config_groups", "at least one group", {})
    return [_group(groups.within(name), settings) for name in groups.values]


def parse_targets(settings: Settings, name: str) -> Targets:
    """Reads a list of targets, or of what is left out."""
    listed = settings.values.get(name) or []
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise settings.wrong(name, "a list of strings", listed)
    patterns = []
    for text in listed:
        if text.startswith("re:"):
            try:
                patterns.append(re.compile(text.removeprefix("re:")))
            except re.error as error:
                raise CheckpointError(f"{settings.where}: {name}: {brief(text)} is no expression: {error}") from None
    return Targets(frozenset(each for each in listed if not each.startswith("re:")), tuple(patterns))


def find_group(groups: Sequence[Group], module: str) -> Group | None:
    """Returns the group that names a module; else the first with an expression that matches it; else of its class."""
    for rank in ("name", "pattern", "class"):
        for group in groups:
            if group.targets.match(module) == rank:
                return group
    return None


def _group(settings: Settings, whole: Settings) -> Group:
    refuse_unknown(settings, GROUP_KEYS)
    form = (settings if settings.has("format") else whole).one_of("format", (*FORMATS, MIXED))
    if form == MIXED:
        raise settings.wrong("format", f"one of {', '.join(FORMATS)}", None)
    weights = settings.within("weights")
    refuse_unknown(weights, ARGUMENTS)
    weights.refuse("dynamic", unless=False, why="expected scales that are in the files")
    if weights.values.get("actorder") not in (None, False, "weight", "static"):
        raise weights.wrong(
            "actorder", "weight, or none: groups of inputs that lie side by side", weights.values["actorder"]
        )
    kind, bits = weights.one_of("type", ("int", "float"), "int"), weights.size("num_bits", 8)
    known = (8,) if kind == "float" or form == FLOAT else (2, 3, 4, 8)
    if bits not in known or ((kind == "float") != (form == FLOAT) and form != "naive-quantized"):
        raise weights.wrong("type, num_bits", f"what {form} holds", f"{kind}, {bits}")
    symmetric = weights.flag("symmetric", True)
    if not symmetric and form != PACKED:
        raise weights.wrong("symmetric", f"true in {form}", False)
    activations, notes = _activations(settings)
    targets, steps = parse_targets(settings, "targets"), _steps(settings)
    return Group(targets, form, kind, bits, symmetric, *_block(weights), activations, steps, notes)


def _block(weights: Settings) -> tuple[int, int]:
    """Returns rows and columns of the block that shares a scale, 0 for all of them."""
    size = weights.values.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), default)
    if strategy == "group":
        return 1, group_of(weights)
    if strategy != "block":
        return int(strategy == "channel"), 0
    block = weights.values.get("block_structure")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 1 < n <= 2**20 for n in block):
        raise weights.wrong("block_structure", "two whole numbers, [rows, columns]", block)
    return block[0], block[1]


def _steps(settings: Settings) -> tuple[str, ...]:
    """Returns the tensors of the steps, and what of them stands for zero, of activations that have them in files."""
    steps = []
    for kind in ("input", "output"):
        said = settings.within(f"{kind}_activations") if settings.has(f"{kind}_activations") else None
        if said is not None and said.values.get("dynamic") in (None, False):
            steps += [f"{kind}_scale", *([] if said.flag("symmetric", True) else [f"{kind}_zero_point"])]
    return tuple(steps)


def _activations(settings: Settings) -> tuple[str | None, tuple[str, ...]]:
    """Returns how activations are rounded; or that they are not, and a note, where no scheme of ours rounds so."""
    notes = ("output_activations: outputs are not rounded",) if settings.has("output_activations") else ()
    if not settings.has("input_activations"):
        return None, notes
    inputs = settings.within("input_activations")
    refuse_unknown(inputs, ARGUMENTS)
    said = {"type": "int", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
    said |= {key: inputs.values[key] for key in said if inputs.has(key)}
    for (kind, step), known in ROUNDED.items():
        if said == {"num_bits": 8, "symmetric": True, **known}:
            return f"{kind}_{step}", notes
    told = ", ".join(f"{key}={value}" for key, value in said.items())
    return None, (*notes, f"input_activations ({told}): activations are not rounded, which is more exact")
