"""Formats as text: `int4:g32,asym`, `fp8_e4m3:b128x128`, `nvfp4`.

    element [: option, ...]

element: int8, int4, int3, int2, fp8_e4m3, fp8_e5m2, fp4_e2m1, nf4; or a whole format: bf16, f16, mxfp4, mxfp8, nvfp4,
and llama.cpp's blocks, q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs.
options: what shares a scale, `tensor`, `channel`, `g32` (successive weights of a channel) or `b128x128` (rows by
columns, cut at the end of the weight); the type of scales, `s=f32`, `bf16`, `f16`, `e8m0` (powers of two) or `e4m3`
(beside a float32 factor for the tensor); `asym`, a zero point of 8 bits, for integers, or `z=bf16`, `z=f16`, one that
need not be whole; in all but llama.cpp's blocks `2of4`, two of every four successive weights of a channel and a bit
for each that says which, the others zero, or `50%` of a matrix zero, wherever they are.
"""

import functools
import re
from collections.abc import Callable, Mapping

from xlathe.errors import OptionError, did_you_mean
from xlathe.storage.block_values import VALUES
from xlathe.storage.blocks import Blocks
from xlathe.storage.cast import DTYPES as CASTS
from xlathe.storage.cast import Cast
from xlathe.storage.elements import FLOATS, INTEGERS, find_element
from xlathe.storage.format import Format
from xlathe.storage.masked import Masked
from xlathe.storage.scaled import DTYPES, ZEROS, Scaled
from xlathe.storage.scattered import Scattered

WHOLE: Mapping[str, Format] = {
    "mxfp4": Scaled("fp4_e2m1", 1, 32, "e8m0"),
    "mxfp8": Scaled("fp8_e4m3", 1, 32, "e8m0"),
    "nvfp4": Scaled("fp4_e2m1", 1, 16, "e4m3"),
} | {name: Cast(name) for name in CASTS} | {name: Blocks(name) for name in VALUES}
"""Formats without options: OCP Microscaling Formats 1.0, NVIDIA's NVFP4, floats of 16 bits, and GGUF's blocks."""
SHARED = {"int8": "channel", "fp8_e4m3": "channel", "fp8_e5m2": "channel", "nf4": "g64"}
"""What shares a scale by default; a group of 32 in others."""
_BLOCK = re.compile(r"b([1-9]\d*)x([1-9]\d*)")
_GROUP = re.compile(r"g([1-9]\d*)")
_ZEROS = re.compile(r"([1-9]\d*)of([1-9]\d*)|(\d+(?:\.\d+)?)%")


@functools.cache
def parse_format(text: str) -> Format:
    """Returns the format of a text. Raises OptionError for what is unknown or does not go together."""
    name, _, rest = text.partition(":")
    options = rest.split(",") if rest else []
    if patterns := [option for option in options if _ZEROS.fullmatch(option)]:
        return _without_zeros(text, name, [option for option in options if option not in patterns], patterns)
    if name in WHOLE:
        if options:
            raise OptionError(f"{text!r}: {name} has no options")
        return WHOLE[name]
    known = [*INTEGERS, *FLOATS]
    if name not in known:
        raise OptionError(f"{text!r}: {name!r} is not known{did_you_mean(name, [*known, *WHOLE])}")
    return _scaled(text, name, options)


def _without_zeros(text: str, name: str, options: list[str], patterns: list[str]) -> Masked | Scattered:
    dense = parse_format(f"{name}:{','.join(options)}" if options else name)
    if len(patterns) > 1:
        raise OptionError(f"{text!r}: {' and '.join(patterns)} exclude each other")
    if not isinstance(dense, Cast | Scaled):
        raise OptionError(f"{text!r}: blocks hold all of their weights")
    if patterns[0].endswith("%"):
        return _scattered(text, dense, patterns[0])
    keep, of = map(int, patterns[0].split("of"))
    if keep >= of:
        raise OptionError(f"{text!r}: expected fewer than {of} of {of}")
    if isinstance(dense, Scaled) and dense.columns % of:
        raise OptionError(f"{text!r}: expected a group of {dense.columns} to be whole times {of}")
    return Masked(dense, keep, of)


def _scattered(text: str, dense: Cast | Scaled, option: str) -> Scattered:
    percent = float(option.removesuffix("%"))
    if not 0.0001 <= percent < 100:
        raise OptionError(f"{text!r}: expected zeros of 0.0001% or more and less than 100%")
    if percent != float(f"{percent:g}"):
        raise OptionError(f"{text!r}: expected at most 6 digits")
    return Scattered(dense, percent)


def _scaled(text: str, name: str, options: list[str]) -> Scaled:
    found: dict[str, str] = {}
    for option in options:
        kind = _kind(option)
        if kind is None:
            hint = did_you_mean(option, ["tensor", "channel", "g32", "b128x128", "asym", "s=bf16", "z=bf16"])
            raise OptionError(f"{text!r}: option {option!r} is not known{hint}")
        if kind in found:
            raise OptionError(f"{text!r}: {found[kind]} and {option} exclude each other")
        found[kind] = option
    rows, columns = _block(found.get("shared", SHARED.get(name, "g32")))
    scale = found.get("scale", "s=bf16" if rows == 1 and columns else "s=f32").removeprefix("s=")
    zero = {"asym": "u8"}.get(found.get("zero", ""), found.get("zero", "").removeprefix("z="))
    result = Scaled(name, rows, columns, scale, zero)
    _together(text, result)
    return result


def _kind(option: str) -> str | None:
    if option in ("tensor", "channel") or _GROUP.fullmatch(option) or _BLOCK.fullmatch(option):
        return "shared"
    if option == "asym" or option in (f"z={zero}" for zero in ZEROS if zero != "u8"):
        return "zero"
    return "scale" if option in (f"s={scale}" for scale in DTYPES) else None


def _block(shared: str) -> tuple[int, int]:
    if shared in ("tensor", "channel"):
        return int(shared == "channel"), 0
    if group := _GROUP.fullmatch(shared):
        return 1, int(group[1])
    rows, columns = map(int, shared.removeprefix("b").split("x"))
    return rows, columns


def _together(text: str, stored: Scaled) -> None:
    unit = find_element(stored.element, signed=True).unit
    rules: list[tuple[Callable[[], bool], str]] = [
        (lambda: bool(stored.zero) and stored.element not in INTEGERS, "zero points are for integers"),
        (lambda: bool(stored.zero) and stored.scale in ("e8m0", "e4m3"), f"s={stored.scale} has no zero points"),
        (lambda: stored.scale == "e8m0" and stored.element in INTEGERS, "s=e8m0 is for floats"),
        (lambda: stored.scale == "e4m3" and stored.element in INTEGERS, "s=e4m3 is for floats"),
        (lambda: bool(stored.columns % unit), f"group={stored.columns}: expected a positive multiple of {unit}"),
    ]
    for broken, reason in rules:
        if broken():
            raise OptionError(f"{text!r}: {reason}")


def print_scaled(stored: Scaled) -> str:
    """Returns the shortest full text of a format: what shares a scale is always told."""
    for name, whole in WHOLE.items():
        if whole == stored:
            return name
    shared = {(0, 0): "tensor", (1, 0): "channel"}.get((stored.rows, stored.columns))
    if shared is None:
        shared = f"g{stored.columns}" if stored.rows == 1 else f"b{stored.rows}x{stored.columns}"
    usual = "bf16" if stored.rows == 1 and stored.columns else "f32"
    scale = [f"s={stored.scale}"] if stored.scale != usual else []
    zero = {"": [], "u8": ["asym"]}.get(stored.zero, [f"z={stored.zero}"])
    return f"{stored.element}:{','.join([shared, *zero, *scale])}"
