"""A scheme: how a weight is stored, and how what it is multiplied with is rounded. Text: `int4:g32,a=int8`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, final

import jax.numpy as jnp

from xlathe.errors import OptionError, did_you_mean
from xlathe.ops.activations import ACTIVATIONS, BLOCK
from xlathe.storage import Blocks, Format, Part, Scaled, parse_format
from xlathe.storage.elements import INTEGERS


@final
@dataclasses.dataclass(frozen=True)
class Scheme:
    """stored: the format of the weight. activations: None, they stay as they are, or one of `ACTIVATIONS`."""

    stored: Format
    activations: str | None = None

    @staticmethod
    def parse(text: str) -> "Scheme":
        """Reads a format's text with one more option, `a=int8_token`. Raises OptionError where it is none."""
        name, _, rest = text.partition(":")
        options = rest.split(",") if rest else []
        rounded = [option.removeprefix("a=") for option in options if option.startswith("a=")]
        left = ",".join(option for option in options if not option.startswith("a="))
        scheme = Scheme(parse_format(f"{name}:{left}" if left else name), rounded[0] if rounded else None)
        if len(rounded) > 1:
            raise OptionError(f"{text!r}: a={rounded[0]} and a={rounded[1]} exclude each other")
        if scheme.activations not in (None, *ACTIVATIONS):
            hint = did_you_mean(str(scheme.activations), ACTIVATIONS)
            raise OptionError(f"{text!r}: activations {scheme.activations!r} is not known{hint}")
        if scheme.activations == "int8":
            _check_blocks(text, scheme.stored)
        return scheme

    def __str__(self) -> str:
        text = str(self.stored)
        if self.activations is None:
            return text
        return f"{text}{',' if ':' in text else ':'}a={self.activations}"

    @property
    def is_static(self) -> bool:
        """Whether activations are rounded in steps that calibration found."""
        return self.activations is not None and self.activations.endswith("_static")

    def parts(self, n: int, k: int) -> Mapping[str, Part]:
        """Returns what replaces a weight, by the suffix of its name: the operands of `quantized_dot` after x."""
        return {**self.stored.parts(n, k), **({"input": Part((), jnp.dtype("float32"), 0)} if self.is_static else {})}

    def attributes(self) -> Mapping[str, Any]:
        """Returns the attributes of the operation beside `out_dtype`."""
        return {"format": str(self.stored)} | ({"activations": self.activations} if self.activations else {})

    def check(self, name: str, shape: Sequence[int], n: int, k: int) -> None:
        """Raises OptionError where a weight, [n, k] with k summed over, cannot be stored."""
        if reason := self.stored.misfit(n, k):
            raise OptionError(
                f"quantize: {reason}, the values that {name} {list(shape)} is summed over; a rule can leave it out"
            )


def _check_blocks(text: str, stored: Format) -> None:
    """Activations in blocks of 32 have exact sums with integers, whose scales a block of 32 must not cross. Blocks of
    files have sums of their own."""
    if isinstance(stored, Blocks):
        return
    if not isinstance(stored, Scaled) or stored.element not in INTEGERS or stored.zero not in ("", "u8"):
        raise OptionError(
            f"{text!r}: a=int8 is for integers with whole zero points; a=int8_token and a=fp8_token are for all"
        )
    if stored.rows != 1 or not stored.columns or stored.columns % BLOCK:
        raise OptionError(
            f"{text!r}: expected a group that is a multiple of {BLOCK} where activations are rounded in blocks"
        )
