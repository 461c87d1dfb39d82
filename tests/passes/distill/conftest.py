"""What is compiled once for all tests of a file."""

import functools
from collections.abc import Iterator

import pytest

from xlathe.passes.distill import train


@pytest.fixture(scope="package", autouse=True)
def compiled_once() -> Iterator[None]:
    """Runs of the same student, lesson and length share what is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_optimizer", "make_add", "make_update", "make_sampler"):
            patch.setattr(train, name, functools.cache(getattr(train, name)))
        yield
