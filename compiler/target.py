"""What programs are compiled for."""

import dataclasses
import functools

from xlathe.errors import OptionError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for. platform: the name that XLA knows it by."""

    name: str
    platform: str


TARGETS = (Target("cpu", "cpu"),)


@functools.cache
def find_target(name: str | None) -> Target:
    """Returns the target called `name`; None is the CPU. Raises OptionError for an unknown name."""
    for target in TARGETS:
        if name in (None, target.name):
            return target
    raise OptionError(f"no target {name!r}{did_you_mean(str(name), [t.name for t in TARGETS])}")
