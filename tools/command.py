"""What a verb of the command line is, how its words are read, and its help text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from xlathe.errors import OptionError

Options = Mapping[str, Any]
"""The values of a verb's flags by name."""


class UsageError(OptionError):
    """The command line itself is wrong: an unknown verb or flag, or too few or too many words."""


def output_file(options: Options, flag: str) -> Path | None:
    """Returns the file that a flag names, None without one; raises UsageError at once where its folder is missing."""
    if not options[flag]:
        return None
    path = Path(options[flag])
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"--{flag}={path}: expected a file in a folder that exists")
    return path


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    positionals: names of the words that it takes, all of them required; define: adds its flags to a
    `FlagValues` of its own; run: called with the options and one string a positional.
    """

    name: str
    summary: str
    positionals: tuple[str, ...]
    define: Callable[[flags.FlagValues], None]
    run: Callable[..., None]

    @property
    def usage(self) -> str:
        return " ".join(["xlathe", self.name, *self.positionals, "[--flags]"])

    def help(self) -> str:
        """Returns usage, summary and one line a flag."""
        values = self._flags()
        lines = [_flag_line(values[name]) for name in sorted(set(values) - {"help"})]
        listed = ["", "flags:", *lines] if lines else []
        return "\n".join([f"usage: {self.usage}", "", f"  {self.summary}", *listed])

    def __call__(self, words: Sequence[str]) -> None:
        """Parses `words` and runs, or prints the help; raises UsageError where they do not fit."""
        values = self._flags()
        try:
            positionals = values([f"xlathe {self.name}", *words])[1:]
        except flags.Error as error:
            raise UsageError(f"{error}; see xlathe {self.name} --help") from None
        options = values.flag_values_dict()
        if options.pop("help"):
            print(self.help())
            return
        if len(positionals) != len(self.positionals):
            found = " ".join(map(repr, positionals)) or "none"
            raise UsageError(f"expected {self.usage}, found the words {found}")
        self.run(options, *positionals)

    def _flags(self) -> flags.FlagValues:
        values = flags.FlagValues()
        self.define(values)
        flags.DEFINE_boolean("help", False, "print this text", flag_values=values)
        return values


def _flag_line(flag: flags.Flag[Any]) -> str:
    kind = "" if flag.boolean else f"={flag.parser.flag_type().upper()}"
    default = "" if flag.default in (None, False, "", []) else f" (default {flag.default})"
    return f"  {f'--{flag.name}{kind}':<26} {' '.join(flag.help.split())}{default}"
