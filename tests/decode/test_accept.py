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

Laws = dict[tuple[int, ...], np.ndarray]  # of the next token, by the tokens before it


def laws_of(kind: str, vocab: int, length: int, seed: int) -> tuple[Laws, Laws]:
    """Target and draft, each with a law of its own after every prefix of up to `length` tokens."""
    rng = np.random.default_rng(seed)

    def law() -> np.ndarray:
        weights = rng.exponential(size=vocab)
        match kind:
            case "zeros":
                weights *= rng.random(vocab) < 0.6
                weights[rng.integers(vocab)] += 0.5
            case "ties":
                weights = rng.integers(1, 3, vocab).astype(float)
            case "points":
                weights = (np.arange(vocab) == rng.integers(vocab)).astype(float)
        return weights / weights.sum()

    prefixes = [p for n in range(length + 1) for p in itertools.product(range(vocab), repeat=n)]
    p, q = ({prefix: law() for prefix in prefixes} for _ in range(2))
    if kind == "equal":
        q = p
    if kind == "disjoint":
        half = np.arange(vocab) < vocab // 2
        p = {prefix: np.where(half, x, 0) / x[half].sum() for prefix, x in p.items()}
        q = {prefix: np.where(half, 0, x) / x[~half].sum() for prefix, x in q.items()}
    return p, q


def probability(laws: Laws, path: tuple[int, ...], start: int = 0) -> float:
    return float(np.prod([laws[path[:i]][path[i]] for i in range(start, len(path))]))


def emitted_law(rule: Callable, p: Laws, q: Laws, vocab: int, gamma: int) -> dict[tuple[int, ...], float]:
    """The exact law of the first gamma + 1 tokens: all drafts, and for each u the two pieces on which nothing changes.

    Tokens that a round leaves open are the target's own, drawn after what the round emitted.
    """
    paths = [d for d in itertools.product(range(vocab), repeat=gamma) if probability(q, d) > 0]
    cases = []
    for d in paths:
        edges = [min(1.0, p[d[:i]][d[i]] / q[d[:i]][d[i]]) for i in range(gamma)]
        for pieces in itertools.product((False, True), repeat=gamma):
            weight = probability(q, d) * np.prod([e if low else 1 - e for e, low in zip(edges, pieces, strict=True)])
            u = [e / 2 if low else (1 + e) / 2 for e, low in zip(edges, pieces, strict=True)]
            if weight > 0:
                cases.append((d, u, weight))
    laws_p = np.array([[p[d[:i]] for i in range(gamma + 1)] for d, _, _ in cases])
    laws_q = np.array([[q[d[:i]] for i in range(gamma)] for d, _, _ in cases])
    drafts, coins = np.array([d for d, _, _ in cases], np.int32), np.array([u for _, u, _ in cases])
    counts, following = (np.asarray(x) for x in jax.jit(jax.vmap(rule))(laws_p, laws_q, drafts, coins))
    assert following.dtype == np.float64
    found: dict[tuple[int, ...], float] = dict.fromkeys(itertools.product(range(vocab), repeat=gamma + 1), 0.0)
    for (d, _, weight), count, law in zip(cases, counts, following, strict=True):
        for token in range(vocab):
            start = (*d[:count], token)
            for rest in itertools.product(range(vocab), repeat=gamma - count):
                path = start + rest
                found[path] += weight * law[token] * probability(p, path, len(start))
    return found


KINDS = ["dense", "zeros", "ties", "points", "equal", "disjoint"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "gamma"), [(6, 1), (4, 2), (3, 3)])
def test_the_ratio_rule_has_the_law_of_the_target(kind: str, vocab: int, gamma: int) -> None:
    with jax.enable_x64(True):
        p, q = laws_of(kind, vocab, gamma, seed=vocab)
        found = emitted_law(accept, p, q, vocab, gamma)
        for path, mass in found.items():
            assert mass == pytest.approx(probability(p, path), abs=1e-15, rel=1e-12)
            assert (mass > 0) == (probability(p, path) > 0)  # what cannot be never is


def test_the_enumeration_sees_a_rule_that_is_wrong() -> None:
    def biased(p: jax.Array, q: jax.Array, drafted: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        count, _ = accept(p, q, drafted, u)
        return count, p[count]  # a draft that falls is replaced by the target's own law

    with jax.enable_x64(True):
        p, q = laws_of("dense", 4, 2, seed=0)
        found = emitted_law(biased, p, q, 4, 2)
        assert sum(found.values()) == pytest.approx(1)
        assert max(abs(mass - probability(p, path)) for path, mass in found.items()) > 1e-3


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
