"""A few seconds of what `make fuzz` does for longer, and files that hypothesis makes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.formats.fuzz import attempt, damage, targets
from tests.models.formats.gguf.build import file, info, pair, string

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 32, 2**31, 2**32, 2**61, 2**63])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("index", range(4))
def test_sound_files_are_read(index, made, tmp_path):
    for content in made[index].seeds:
        assert attempt(made[index], content, tmp_path / "sound")


@given(st.integers(0, 2**32), st.sampled_from(range(4)))
@QUICK
def test_damaged_files_are_read_or_refused(made, tmp_path: Path, seed: int, index: int):
    rng = np.random.default_rng(seed)
    for content in made[index].seeds:
        attempt(made[index], damage(content, rng), tmp_path / "damaged")


@st.composite
def header(draw) -> bytes:
    """A header that keeps the grammar, with numbers of any size in it."""
    values = st.tuples(st.integers(0, 14), st.binary(max_size=40))
    pairs = [pair(draw(st.text(max_size=8)), *draw(values)) for _ in range(draw(st.integers(0, 3)))]
    dims = st.lists(WORDS | st.integers(0, 64), max_size=5).map(tuple)
    infos = [
        info(draw(st.text(max_size=8)), draw(dims), draw(st.integers(0, 45)), draw(WORDS | st.just(0)))
        for _ in range(draw(st.integers(0, 3)))
    ]
    architecture = pair("general.architecture", 8, string("llama"))
    return file([architecture, *pairs], infos, draw(st.binary(max_size=300)))


@given(header())
@QUICK
def test_any_header_is_read_or_refused(made, tmp_path: Path, content: bytes):
    for target in made[:2]:
        attempt(target, content, tmp_path / "made")
