"""Look-up of drafts in the text, against a search written out."""

import jax
import numpy as np
import pytest

from xlathe.decode.drafters import NGram, look_up
from xlathe.errors import OptionError

run = jax.jit(look_up, static_argnums=(2, 3))


def reference(text: list[int], n: int, gamma: int) -> list[int]:
    """Drafts for one text, by search for ever shorter ends from its last place on."""
    for size in range(min(n, len(text)), 0, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                followed = text[end:]
                return [followed[i % len(followed)] for i in range(gamma)]
    return [-1] * gamma


@pytest.mark.parametrize(("text", "expected"), [
    ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2]),  # after the longest end
    ([1, 2, 5, 7, 2, 6, 3, 1, 2], [5, 7, 2, 6]),  # a longer end wins over a later place
    ([2, 5, 0, 2, 6, 0, 3, 2], [6, 0, 3, 2]),  # of equal ends the last
    ([4, 5, 4, 5], [4, 5, 4, 5]),  # the repetition goes on
    ([7, 7], [7, 7, 7, 7]),
    ([1, 2, 3], [-1, -1, -1, -1]),  # new
    ([1], [-1, -1, -1, -1]),
    ([0], [-1, -1, -1, -1]),  # unused places, which hold 0, are no text
])  # fmt: skip
def test_drafts_are_what_followed(text: list[int], expected: list[int]) -> None:
    assert reference(text, 3, 4) == expected
    padded = np.zeros((1, 12), np.int32)
    padded[0, : len(text)] = text
    assert run(padded, np.array([len(text) - 1]), 3, 4).tolist() == [expected]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("gamma", [1, 4])
def test_any_text(n: int, gamma: int) -> None:
    rng = np.random.default_rng(n)
    texts = rng.integers(0, 3, (200, 24), dtype=np.int32)  # what lies behind a text's end is not read
    lengths = rng.integers(1, 25, 200)
    found = run(texts, lengths - 1, n, gamma)
    expected = [reference(text[:length].tolist(), n, gamma) for text, length in zip(texts, lengths, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", None, True])
def test_lengths_that_are_none(n: object) -> None:
    with pytest.raises(OptionError, match="NGram: n must be an integer of at least 1"):
        NGram(n)  # type: ignore[arg-type]
