"""Numbers of each token are those of NumPy in float64, written out."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from xlathe.errors import OptionError, XlatheError
from xlathe.tools import scores
from xlathe.tools.scores import compare, score

RNG = np.random.default_rng(0)
WINDOWS = RNG.integers(0, 700, (5, 12), dtype=np.int32)
LOGITS = (6 * RNG.normal(size=(5, 12, 700)) + 40).astype(np.float32)  # peaked, and far from 0


@dataclasses.dataclass
class Table:
    """A model whose logits of known windows are given; counts the rows that it is asked for."""

    logits: np.ndarray
    asked: list[int] = dataclasses.field(default_factory=list)

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1]

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        self.asked.append(len(tokens))
        found = [int(np.flatnonzero((row == WINDOWS).all(1))[0]) for row in tokens]
        return self.logits[found]


def silent(text: str, fraction: float) -> None:
    """Nobody looks."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def following(log_probs: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_probs[:, :-1], WINDOWS[:, 1:, None], -1)[..., 0]


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_every_token_is_that_of_float64(first, noise):
    other = (LOGITS + noise * RNG.normal(size=LOGITS.shape)).astype(np.float32)
    found = compare(Table(LOGITS), [Table(other)], WINDOWS, first, silent)[0]
    p, q = log_softmax(LOGITS), log_softmax(other)
    expected = {
        "loss": -following(q),
        "base_loss": -following(p),
        "kl": (np.exp(p) * (p - q)).sum(-1)[:, :-1],
        "same_top1": (p.argmax(-1) == q.argmax(-1))[:, :-1],
        "delta_p": np.exp(following(q)) - np.exp(following(p)),
    }
    assert found.loss.dtype == np.float64 and found.loss.shape == (5, 11 - first)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values[:, first:], rtol=1e-6, atol=2e-7, err_msg=name)


def test_a_small_divergence_is_not_lost_in_rounding():
    """Its terms cancel to a part in a million of each: two log-softmaxes in float32 leave nothing of it."""
    other = (LOGITS + 1e-3 * RNG.normal(size=LOGITS.shape)).astype(np.float32)
    found = compare(Table(LOGITS), [Table(other)], WINDOWS, 0, silent)[0].kl
    p, q = log_softmax(LOGITS), log_softmax(other)
    expected = (np.exp(p) * (p - q)).sum(-1)[:, :-1]
    assert expected.mean() < 1e-6
    assert abs(found.mean() - expected.mean()) < 0.02 * expected.mean()


def test_a_model_does_not_differ_from_itself():
    found = compare(Table(LOGITS), [Table(LOGITS)], WINDOWS, 0, silent)[0]
    assert not found.kl.any() and not found.delta_p.any() and found.same_top1.all()


def test_narrow_logits_are_widened():
    narrow = LOGITS.astype(ml_dtypes.bfloat16)
    found = score(Table(narrow), WINDOWS, 0, silent).loss
    np.testing.assert_allclose(found, -following(log_softmax(narrow)), rtol=1e-6)


def test_tokens_that_cannot_be():
    """A model may rule tokens out; what it never expects costs infinitely much, what neither does costs nothing."""
    both, one = LOGITS.copy(), LOGITS.copy()
    both[..., 3] = one[..., 3] = -np.inf
    assert np.isfinite(compare(Table(both), [Table(one)], WINDOWS[:1], 0, silent)[0].kl).all()
    one[..., int(LOGITS[0, 0].argmax())] = -np.inf
    assert compare(Table(both), [Table(one)], WINDOWS[:1], 0, silent)[0].kl[0, 0] == np.inf


@pytest.mark.parametrize(("rows", "limit", "asked"), [(2, 1 << 26, [2, 2, 2]), (8, 1 << 26, [5]), (8, 1, [1] * 5)])
def test_windows_go_in_batches_of_one_size(monkeypatch, rows, limit, asked):
    monkeypatch.setattr(scores, "_LOGITS", limit)
    monkeypatch.setattr(scores, "_BLOCK", 700 * 4)  # 4 tokens at a time
    model, whole = Table(LOGITS), score(Table(LOGITS), WINDOWS, 1, silent)
    np.testing.assert_array_equal(score(model, WINDOWS, 1, silent, rows).loss, whole.loss)
    assert model.asked == asked


def test_logits_that_are_no_numbers():
    broken = LOGITS.copy()
    broken[2, 4, 7] = np.nan
    with pytest.raises(XlatheError, match="logits of 1 of 55 tokens are no numbers"):
        score(Table(broken), WINDOWS, 0, silent)


def test_other_vocabularies():
    with pytest.raises(OptionError, match="different vocabularies cannot be compared: 700 and 5 tokens"):
        compare(Table(LOGITS), [Table(LOGITS[..., :5])], WINDOWS, 0, silent)
