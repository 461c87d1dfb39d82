"""`xlathe passes`: lists the passes and their options."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator

from absl import flags

from xlathe.tools.command import Options, Verb


def define(values: flags.FlagValues) -> None:
    """There is nothing to choose."""


def run(options: Options) -> None:
    from xlathe.passes import PASSES

    for name, cls in PASSES.items():
        print(f"{name:<16} {(inspect.getdoc(cls) or '').splitlines()[0]}")
        for line in _options(cls):
            print(f"{'':<16}   {line}")


def _options(cls: type) -> Iterator[str]:
    """Yields `name: type = default` for each option, as code writes them."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        yield f"{field.name}: {inspect.formatannotation(hints[field.name])}{default}"


VERB = Verb("passes", "list the passes and their options", (), define, run)
