"""The rules of speculative decoding: the default path by path, the ratio rule by exact enumeration in float64."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from xlathe.decode.accept import RULES, accept, agree
from xlathe.decode.logits import Sampling, sample

Laws = tuple[np.ndarray, ...]  # of the next token after every prefix: the i-th is float64 [vocab] * (i + 1)


def laws_of(kind: str, vocab: int, gamma: int, seed: int) -> tuple[Laws, Laws]:
    """Target and draft, each with a law of its own after every prefix of up to gamma tokens."""
    rng = np.random.default_rng(seed)

    def laws(length: int) -> np.ndarray:
        shape = (vocab,) * (length + 1)
        weights = rng.exponential(size=shape)
        some = np.arange(vocab) == rng.integers(vocab, size=(*shape[:-1], 1))  # one token of each law
        match kind:
            case "zeros":
                weights = weights * (rng.random(shape) < 0.6) + 0.5 * some
            case "ties":
                weights = rng.integers(1, 3, shape).astype(float)
            case "points":
                weights = some.astype(float)
        return weights

    p, q = ([laws(length) for length in range(gamma + 1)] for _ in range(2))
    if kind == "disjoint":
        half = np.arange(vocab) < vocab // 2
        p, q = ([weights * side for weights in each] for each, side in ((p, half), (q, ~half)))
    p, q = (tuple(w / w.sum(-1, keepdims=True) for w in each) for each in (p, q))
    return p, p if kind == "equal" else q


def extend(beginnings: np.ndarray, laws: Laws, length: int) -> np.ndarray:
    """Goes on to paths of so many tokens, each drawn from the law after those before it."""
    for i in range(beginnings.ndim, length):
        beginnings = beginnings[..., None] * laws[i]
    return beginnings


def emitted_law(rule: Callable, p: Laws, q: Laws) -> np.ndarray:
    """The exact law of the first gamma + 1 tokens, float64 [vocab] * (gamma + 1).

    Enumerated are all drafts and, for each u, the two pieces of [0, 1) on which nothing changes. Tokens that a round
    leaves open are the target's own, drawn after what the round emitted.
    """
    vocab, gamma = len(p[0]), len(p) - 1
    paths, lower = (np.array(list(itertools.product(range(n), repeat=gamma))) for n in (vocab, 2))
    d, low = np.repeat(paths, len(lower), axis=0), np.tile(lower, (len(paths), 1)).astype(bool)
    cases = np.arange(len(d))[:, None]
    laws_p, laws_q = (
        np.stack([np.broadcast_to(x[i][tuple(d[:, :i].T)], (len(d), vocab)) for i in range(n)], axis=1)
        for x, n in ((p, gamma + 1), (q, gamma))
    )
    p_drafted, q_drafted = (x[cases, np.arange(gamma), d] for x in (laws_p, laws_q))
    with np.errstate(divide="ignore", invalid="ignore"):
        edges = np.where(q_drafted > 0, np.minimum(1, p_drafted / q_drafted), p_drafted > 0)
    weight = (q_drafted * np.where(low, edges, 1 - edges)).prod(1)
    u = np.where(low, edges / 2, (1 + edges) / 2)
    counts, following = (np.asarray(x) for x in rule(laws_p, laws_q, d.astype(np.int32), u))
    assert following.dtype == np.float64
    np.testing.assert_allclose(following.sum(-1), 1, rtol=1e-12)  # also where the drafts cannot be
    found = np.zeros((vocab,) * (gamma + 1))
    for count in range(gamma + 1):
        which, beginnings = counts == count, np.zeros((vocab,) * (count + 1))
        mass = weight[which, None] * following[which]
        *places, _ = np.broadcast_arrays(*d[which, :count].T[..., None], np.arange(vocab), mass)
        np.add.at(beginnings, tuple(places), mass)
        found += extend(beginnings, p, gamma + 1)
    return found


KINDS = ["dense", "zeros", "ties", "points", "equal", "disjoint"]


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("vocab", [2, 3, 4, 5, 6])
def test_the_ratio_rule_has_the_law_of_the_target(vocab: int, gamma: int) -> None:
    with jax.enable_x64(True):
        rule = jax.jit(jax.vmap(accept))
        for kind in KINDS:
            p, q = laws_of(kind, vocab, gamma, seed=vocab)
            found, expected = emitted_law(rule, p, q), extend(p[0], p, gamma + 1)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15, err_msg=kind)
            np.testing.assert_array_equal(found > 0, expected > 0, err_msg=kind)  # what cannot be never is


def test_the_laws_are_what_they_are_called() -> None:
    laws = {kind: laws_of(kind, 6, 3, seed=0) for kind in KINDS}
    last = {kind: (p[2], q[2]) for kind, (p, q) in laws.items()}
    assert all((p > 0).all() and (q > 0).all() and (p != q).all() for p, q in [last["dense"]])
    assert all(0 < (law == 0).mean() < 1 and (law > 0).any(-1).all() for law in last["zeros"])
    assert (last["ties"][0] == last["ties"][1]).any() and (np.diff(last["ties"][0]) == 0).any()
    assert all((np.sort(law) == [0, 0, 0, 0, 0, 1]).all() for law in last["points"])
    assert (last["equal"][0] == last["equal"][1]).all()
    assert not (last["disjoint"][0] * last["disjoint"][1]).any()


def test_the_enumeration_sees_a_rule_that_is_wrong() -> None:
    def biased(p: jax.Array, q: jax.Array, drafted: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        count, _ = accept(p, q, drafted, u)
        return count, p[count]  # a draft that falls is replaced by the target's own law

    with jax.enable_x64(True):
        p, q = laws_of("dense", 4, 2, seed=0)
        found = emitted_law(jax.vmap(biased), p, q)
        assert found.sum() == pytest.approx(1)
        assert np.abs(found - extend(p[0], p, 3)).max() > 1e-3


def test_at_the_edges_of_u() -> None:
    p = jnp.array([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    q = jnp.array([[0.5, 0.5, 0.0]])
    count = {
        (token, u): int(accept(p, q, jnp.array([token]), jnp.array([u]))[0])
        for token, u in [(0, 0.0), (1, 0.0), (1, np.nextafter(np.float32(0.5), np.float32(0))), (1, 0.5)]
    }
    assert list(count.values()) == [0, 1, 1, 0]  # p = 0 falls at u = 0; u < p / q is strict


def test_where_nothing_is_left_of_the_difference() -> None:
    law = jnp.array([[0.5, 0.5]])
    count, following = accept(jnp.concatenate([law, law]), law, jnp.array([0]), jnp.array([1.0]))  # u = 1 is no value
    assert count == 0
    np.testing.assert_array_equal(following, law[0])


def test_where_there_is_no_draft_the_next_token_is_the_targets() -> None:
    p = jnp.array([[0.2, 0.8], [0.6, 0.4]])
    count, following = accept(p, jnp.zeros((1, 2)), jnp.array([-1]), jnp.array([0.0]))
    assert count == 0
    np.testing.assert_allclose(following, p[0], rtol=1e-6)


def test_on_every_path_of_drafts_the_default_rule_emits_what_plain_decoding_does() -> None:
    vocab, gamma, first, seeds = 4, 3, 5, range(6)
    rng = np.random.default_rng(0)
    prefixes = [path for n in range(gamma + 1) for path in itertools.product(range(vocab), repeat=n)]
    logits = {path: rng.normal(0, 1, vocab).astype(np.float32) for path in prefixes}
    draw = jax.jit(sample)
    plain = {}
    for temperature, seed in itertools.product([0.0, 2.0], seeds):
        one, text = Sampling.of(1, temperature=temperature, seed=seed), ()
        for i in range(gamma + 1):
            text += (int(draw(logits[text][None], one, jnp.array([first + i]))[0]),)
        plain[temperature, seed] = text
    assert len(set(plain.values())) > 3
    paths = list(itertools.product(range(vocab), repeat=gamma))
    cases = [(path, case) for case in plain for path in paths]
    rows = Sampling.of(
        len(cases), temperature=[case[0] for _, case in cases], seed=[case[1] for _, case in cases]
    )
    given = np.array([[logits[path[:i]] for i in range(gamma + 1)] for path, _ in cases])
    places = jnp.full(len(cases), first)
    drafts = np.array([path for path, _ in cases], np.int32)
    counts, following = jax.jit(RULES["match"].judge)(given, drafts, np.zeros_like(given[:, 1:]), rows, places)
    last = draw(following, rows, places + counts)
    emitted = [(*path[:n], int(t)) for (path, _), n, t in zip(cases, counts.tolist(), last, strict=True)]
    agreed = [next((i for i in range(gamma) if path[i] != plain[case][i]), gamma) for path, case in cases]
    assert counts.tolist() == agreed
    assert emitted == [plain[case][: n + 1] for (_, case), n in zip(cases, agreed, strict=True)]


def test_the_ratio_rules_draws_are_independent_of_each_other() -> None:
    rows, vocab, gamma = 6_000, 4, 2
    rng = np.random.default_rng(0)
    p_logits, q_logits = (rng.normal(0, 1, (gamma + 1, vocab)).astype(np.float32) for _ in range(2))
    sampling, rule, draw = Sampling.of(rows, temperature=1.0, seed=3), RULES["ratio"], jax.jit(sample)
    places = jnp.full(rows, 7)
    drafts = jnp.stack(
        [
            draw(jnp.broadcast_to(q_logits[i], (rows, vocab)), rule.drafting(sampling), places + i)
            for i in range(gamma)
        ],
        axis=1,
    )
    given, drawn_from = (jnp.broadcast_to(x, (rows, *x.shape)) for x in (p_logits, q_logits[:gamma]))
    counts, following = jax.jit(rule.judge)(given, drafts, drawn_from, sampling, places)
    first = jnp.where(counts > 0, drafts[:, 0], following.argmax(-1))
    check_law(first, p_logits[0])
    second = jnp.where(counts > 1, drafts[:, 1], following.argmax(-1))[counts > 0]
    check_law(second, p_logits[1])


def check_law(tokens: jax.Array, logits: np.ndarray) -> None:
    weights = np.exp(logits.astype(np.float64))
    counts = np.bincount(tokens, minlength=len(weights))
    assert stats.chisquare(counts, len(tokens) * weights / weights.sum()).pvalue > 0.01


def test_agreement_ends_at_the_first_difference() -> None:
    drafts = jnp.array([[1, 2, 3], [1, 0, 3], [0, 2, 3], [-1, -1, -1]])
    assert agree(drafts, jnp.array([1, 2, 3])).tolist() == [3, 1, 0, 0]
