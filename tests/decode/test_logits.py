"""The logits pipeline against full sorts in float64, and the noise law against its distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

from xlathe.decode.logits import Sampling, filter_logits, gumbel, gumbel_at, sample
from xlathe.decode.threshold import head_size
from xlathe.errors import OptionError, XlatheError

NAMES = ["temperature", "top_k", "top_p", "min_p"]
EDGE = 1e-6  # how far float32 may move the mass at which top-p cuts, or the score at which min-p does

run_filter = jax.jit(filter_logits)
run_sample = jax.jit(sample)
run_gumbel = jax.jit(gumbel, static_argnums=2)


def reference_law(logits, temperature, top_k, top_p, min_p):
    """Log probabilities of one row of float32 logits: float64, by a full sort."""
    with np.errstate(over="ignore"):
        scores = ((logits - logits.max()) / np.float32(temperature)).astype(np.float64)
    if 0 < top_k < len(scores):
        scores = np.where(scores >= np.sort(scores)[::-1][top_k - 1], scores, -np.inf)
    if top_p < 1:
        order = np.argsort(-scores, kind="stable")
        share = np.cumsum(np.exp(scores[order])) / np.exp(scores).sum()
        crossing = min(np.searchsorted(share, top_p, side="left"), len(scores) - 1)
        scores = np.where(scores >= scores[order[crossing]], scores, -np.inf)
    scores = np.where(np.exp(scores) >= min_p, scores, -np.inf)
    return scores - np.log(np.exp(scores).sum())


def check_law(got, logits, temperature, top_k, top_p, min_p):
    """Asserts one row's law. A token closer than EDGE to where `top_p` or `min_p` cuts may be in or out.

    Returns whether the row was clear of such edges.
    """
    law = functools.partial(reference_law, logits, temperature, top_k)
    p = np.float64(np.float32(top_p))
    loose = law(min(p + EDGE, 1) if p < 1 else 1, min_p * (1 - EDGE))
    tight = law(p - EDGE if p < 1 else 1, min(min_p * (1 + EDGE), 1))
    kept = got > -np.inf
    assert kept.any()
    np.testing.assert_array_equal(kept & (loose == -np.inf), False)
    np.testing.assert_array_equal((tight > -np.inf) & ~kept, False)
    clear = np.array_equal(loose > -np.inf, tight > -np.inf)
    if clear:
        np.testing.assert_allclose(got[kept], loose[kept], rtol=1e-5, atol=1e-5)
    return clear


def draw_logits(kind, rows, vocab, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    match kind:
        case "peaked":
            logits *= 5
        case "flat":
            logits *= 0.01
        case "tied":
            logits = np.round(logits)
        case "masked":
            logits = np.where(rng.random((rows, vocab)) < 0.7, -np.inf, logits)
            logits[:, vocab // 2] = 0
        case "equal":
            logits[:] = -7.25
        case "single":
            logits[:, 1:] = -np.inf
        case "adjacent":
            logits[:] = -1 - np.arange(vocab, dtype=np.float32) * 2.0**-23
            logits[:, 0] = 0
        case "huge":
            logits *= 1e37
        case "signed zeros":
            logits = np.where(logits > 0, 0.0, -0.0).astype(np.float32)
    return logits


KINDS = ["normal", "peaked", "flat", "tied", "masked", "equal", "single", "adjacent", "huge", "signed zeros"]


@pytest.mark.parametrize("vocab", [1, 7, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_law_is_that_of_a_full_sort(kind, vocab):
    options = list(
        itertools.product(
            [0.1, 3.0],
            [0, 1, 2, head_size(vocab), head_size(vocab) + 1, vocab - 1, vocab + 5],
            [1e-30, 0.3, 0.9, 0.9999, 1.0],
            [0.0, 0.02, 1.0],
        )
    )
    columns = dict(zip(NAMES, zip(*options, strict=True), strict=True))
    logits = draw_logits(kind, len(options), vocab)
    law = np.asarray(run_filter(logits, Sampling.of(len(options), **columns)))
    clear = [check_law(row, x, *option) for row, x, option in zip(law, logits, options, strict=True)]
    # Equal tokens put whole multiples of 1/n beside p; elsewhere edges are rare.
    assert np.mean(clear) > 0.95


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied", "masked"])
def test_law_of_a_large_vocabulary(kind):
    options = [
        (1.0, 0, 1.0, 0.0),
        (1.0, 50, 1.0, 0.0),
        (0.7, 40, 0.95, 0.0),
        (1.0, 5000, 0.5, 0.0),
        (1.0, 0, 0.9, 0.0),
        (1.0, 0, 0.999, 0.001),
        (0.3, 20, 0.8, 0.1),
        (2.0, 131_000, 1.0, 0.0),
    ]
    logits = draw_logits(kind, len(options), 131_072)
    clear = []
    for i, (option, row) in enumerate(zip(options, logits, strict=True)):
        one = Sampling.of(1, **dict(zip(NAMES, option, strict=True)))
        clear.append(check_law(np.asarray(run_filter(logits[i : i + 1], one))[0], row, *option))
    assert sum(clear) >= len(options) - 2


def one_row(logits, **options):
    """The law and the draw of one row; rows of any length share a compiled shape."""
    padded = np.pad(np.float32(logits), (0, 6 - len(logits)), constant_values=-np.inf)[None]
    sampling = Sampling.of(1, **options)
    law, tokens = run_filter(padded, sampling), run_sample(padded, sampling, np.int32([3]))
    return np.asarray(law)[0, : len(logits)], int(tokens[0])


def test_ties_stay_together():
    def kept(**options):
        law, token = one_row([1, 3, 2, 3, 2, 0], temperature=1.0, **options)
        assert law[token] > -np.inf
        return np.flatnonzero(law > -np.inf).tolist()

    assert kept(top_k=1) == [1, 3]
    assert kept(top_k=3) == [1, 2, 3, 4]
    assert kept(top_p=0.1) == [1, 3]
    assert kept(top_p=0.75) == [1, 2, 3, 4]
    assert kept(min_p=1.0) == [1, 3]


def test_top_p_counts_the_mass_that_top_k_left():
    law, _ = one_row(np.log([0.4, 0.3, 0.2, 0.1]), temperature=1.0, top_k=2, top_p=0.55)
    # 0.4 is 0.571 of what top-k left: enough alone. Of the whole it would not be.
    np.testing.assert_allclose(law, [0, -np.inf, -np.inf, -np.inf], atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "first"), [([1, 5, 2, 5], 1), ([-np.inf, -np.inf, -3, -3], 2), ([-1, -0.0, 0.0, 0.0], 1)]
)
def test_greedy_takes_the_lowest_of_tied_tokens_whatever_the_filters(logits, first):
    law, token = one_row(logits, temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    assert token == first
    expected = np.full(4, -np.inf)
    expected[first] = 0
    np.testing.assert_array_equal(law, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_no_finite_logit_has_no_law_and_yields_a_token(temperature):
    law, token = one_row([-np.inf] * 6, temperature=temperature, top_k=2, top_p=0.5, min_p=0.1)
    np.testing.assert_array_equal(law, -np.inf)
    assert token == 0


@pytest.mark.parametrize("temperature", [1e-39, 1e-37, 1e37])
def test_extreme_temperatures_are_the_limits(temperature):
    law, _ = one_row([0.5, 2, -3, 1], temperature=temperature)
    np.testing.assert_allclose(np.exp(law), [0, 1, 0, 0] if temperature < 1 else [0.25] * 4, atol=1e-6)


ODD = 4099  # a vocabulary that leaves a remainder in every vector loop
MIXED = {
    "temperature": [0.0, 1.0, 0.7, 1.0, 1.5, 1.0, 0.5],
    "top_k": [0, 0, 40, 200, 0, 0, 3],
    "top_p": [1.0, 1.0, 0.9, 0.8, 0.95, 1.0, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0],
    "seed": [3, 1, 4, 1, 5, 9, 2**62 + 2**40],
}


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied", "flat"])
def test_a_row_alone_equals_the_row_in_a_batch(kind):
    """Bit by bit, though the batch searches all scores where the row alone finds its cut in the head."""
    rows = len(MIXED["seed"])
    logits, positions = draw_logits(kind, rows, ODD), np.arange(100, 100 + rows, dtype=np.int32)
    together = Sampling.of(rows, **MIXED)
    laws, tokens = run_filter(logits, together), run_sample(logits, together, positions)
    for i in range(rows):
        alone = Sampling.of(1, **{name: column[i] for name, column in MIXED.items()})
        np.testing.assert_array_equal(run_filter(logits[i : i + 1], alone)[0], laws[i])
        assert run_sample(logits[i : i + 1], alone, positions[i : i + 1])[0] == tokens[i]


def test_an_idle_row_of_nan_does_not_touch_the_others():
    logits = draw_logits("peaked", 7, ODD)
    sampling, positions = Sampling.of(7, **MIXED), np.arange(7, dtype=np.int32)
    before = run_filter(logits, sampling), run_sample(logits, sampling, positions)
    logits[4] = np.nan
    after = run_filter(logits, sampling), run_sample(logits, sampling, positions)
    others = np.arange(7) != 4
    np.testing.assert_array_equal(np.asarray(after[0])[others], np.asarray(before[0])[others])
    np.testing.assert_array_equal(np.asarray(after[1])[others], np.asarray(before[1])[others])
    assert 0 <= after[1][4] < ODD


def test_noise_is_a_function_of_key_position_and_token():
    keys, positions = Sampling.of(4, seed=11).keys, np.int32([5, 0, 2**31 - 1, 5])
    noise = np.asarray(run_gumbel(keys, positions, 300))
    for i in range(4):
        np.testing.assert_array_equal(run_gumbel(keys[i : i + 1], positions[i : i + 1], 300)[0], noise[i])
    np.testing.assert_array_equal(run_gumbel(keys, positions, 77), noise[:, :77])
    np.testing.assert_array_equal(run_gumbel(keys[::-1], positions[::-1], 300), noise[::-1])
    elsewhere = run_gumbel(keys, positions - 1, 300)
    assert not np.isclose(elsewhere, noise).any()
    assert not np.isclose(noise[0], noise[3]).any()


def test_noise_comes_from_the_bits_of_jax_random():
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(42), 1), 9)
    bits = np.asarray(jax.random.bits(key, (1000,), jnp.uint32)).astype(np.float64)
    expected = -np.log(-np.log1p(-(np.floor(bits / 2) + 0.5) * 2.0**-31))
    noise = run_gumbel(Sampling.of(2, seed=42).keys, np.int32([0, 9]), 1000)[1]
    np.testing.assert_allclose(noise, expected, rtol=2e-5, atol=2e-6)


def test_noise_of_some_tokens_is_that_among_all():
    keys, positions = Sampling.of(3, seed=[1, 2, 3]).keys, np.int32([0, 5, 7])
    tokens = np.random.default_rng(0).integers(0, 32_000, (3, 250), dtype=np.int32)
    some = jax.jit(gumbel_at)(keys, positions, tokens)
    np.testing.assert_array_equal(some, np.take_along_axis(np.asarray(run_gumbel(keys, positions, 32_000)), tokens, 1))


@pytest.mark.parametrize(
    ("options", "share"),
    [({"top_k": 40}, 1), ({"top_p": 0.3}, 1), ({"min_p": 0.2}, 1), ({"top_k": [40, 0] * 8}, 0.5), ({}, 0)],
)
def test_a_token_is_the_likeliest_after_noise(options, share):
    """However few survive, in the whole batch or in some rows, the noise is that of the whole vocabulary."""
    logits = np.random.default_rng(4).normal(size=(16, 1000)).astype(np.float32) * 2
    sampling, positions = Sampling.of(16, seed=6, temperature=1.0, **options), np.arange(16, dtype=np.int32)
    survivors = np.asarray(run_filter(logits, sampling))
    assert ((survivors > -np.inf).sum(-1) <= head_size(1000)).mean() == share
    noisy = survivors + np.asarray(run_gumbel(sampling.keys, positions, 1000))
    np.testing.assert_array_equal(run_sample(logits, sampling, positions), noisy.argmax(-1))


def test_noise_follows_the_gumbel_law_to_its_upper_end():
    noise = np.asarray(run_gumbel(Sampling.of(8, seed=1).keys, np.arange(8, dtype=np.int32), 131_072))
    assert np.isfinite(noise).all()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    # Winners of a flat law over a large vocabulary must not tie: a tie would favor the lower id.
    winners = np.sort(noise)[:, -100:]
    assert (np.diff(winners) > 0).all()


def counts_of(logits, sampling, positions):
    tokens = run_sample(jnp.broadcast_to(logits, (len(positions), len(logits))), sampling, positions)
    return np.bincount(tokens, minlength=len(logits))


def chi_square(counts, law):
    expected = counts.sum() * np.exp(law)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return ((counts - expected)[kept] ** 2 / expected[kept]).sum(), kept.sum() - 1


@pytest.mark.parametrize("axis", ["rows", "positions"])
@pytest.mark.parametrize(
    "option",
    [
        pytest.param((1.0, 0, 1.0, 0.0), id="plain"),
        pytest.param((0.5, 0, 1.0, 0.0), id="cold"),
        pytest.param((2.0, 5, 1.0, 0.0), id="top-k"),
        pytest.param((1.0, 0, 0.8, 0.0), id="top-p"),
        pytest.param((1.0, 0, 1.0, 0.2), id="min-p"),
        pytest.param((1.5, 6, 0.9, 0.1), id="all"),
    ],
)
def test_draws_follow_the_law(option, axis):
    """Pearson's statistic on 50,000 draws, against its 1 - 1e-4 quantile."""
    logits, draws = np.float32([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.8, -2.0]), 50_000
    sampling = Sampling.of(draws, **dict(zip(NAMES, option, strict=True)), seed=5)
    numbers = np.arange(draws, dtype=np.int32)
    if axis == "positions":
        one_key = jnp.broadcast_to(sampling.keys[:1], sampling.keys.shape)
        sampling = jax.tree.map(lambda x: one_key if x is sampling.keys else x, sampling)
    counts = counts_of(logits, sampling, numbers if axis == "positions" else np.zeros_like(numbers))
    statistic, freedom = chi_square(counts, reference_law(logits, *option))
    assert statistic < stats.chi2.ppf(1 - 1e-4, freedom)


def test_successive_draws_of_a_row_are_independent():
    draws = 50_000
    sampling = Sampling.of(draws, temperature=1.0, seed=[8] * draws)
    logits = jnp.where(jnp.arange(8) < 4, 0.0, jnp.full((draws, 8), -jnp.inf))
    tokens = np.asarray(run_sample(logits, sampling, np.arange(draws, dtype=np.int32)))
    pairs = np.bincount(4 * tokens[:-1] + tokens[1:], minlength=16)
    statistic, freedom = chi_square(pairs, np.full(16, -np.log(16)))
    assert statistic < stats.chi2.ppf(1 - 1e-4, freedom)


def test_a_seed_keys_rows_like_fold_in():
    keys = Sampling.of(3, seed=7).keys
    expected = [jax.random.key_data(jax.random.fold_in(jax.random.key(7), i)) for i in range(3)]
    np.testing.assert_array_equal(keys, np.stack(expected))
    np.testing.assert_array_equal(Sampling.of(2, seed=[9, 7]).keys[1], keys[0])
    assert len(np.unique(Sampling.of(3, seed=[1, 2**32 + 1, 2**32]).keys, axis=0)) == 3


def test_runs_in_a_compiled_loop():
    logits, rows, steps = draw_logits("normal", 7, ODD), 7, 10
    sampling = Sampling.of(rows, **MIXED)

    @jax.jit
    def loop(logits, sampling):
        def step(state):
            i, tokens = state
            return i + 1, tokens.at[i].set(sample(logits, sampling, jnp.full(rows, i)))

        start = 0, jnp.zeros((steps, rows), jnp.int32)
        return lax.while_loop(lambda state: state[0] < steps, step, start)[1]

    expected = [run_sample(logits, sampling, np.full(rows, i, np.int32)) for i in range(steps)]
    np.testing.assert_array_equal(loop(logits, sampling), np.stack(expected))


def test_greedy_draws_no_noise_and_the_vocabulary_is_never_sorted():
    logits, sampling, positions = jnp.zeros((4, 4096)), Sampling.of(4), jnp.zeros(4, jnp.int32)
    outside = {equation.primitive.name for equation in jax.make_jaxpr(sample)(logits, sampling, positions).eqns}
    assert "cond" in outside and not outside & {"random_bits", "exp", "log", "while", "scan", "top_k"}
    loop = jax.jit(lambda *given: lax.fori_loop(0, 9, lambda i, t: t + sample(*given[:2], given[2] + i), given[2]))
    assert " sort(" not in loop.lower(logits, sampling, positions).compile().as_text()


def test_survives_export_and_lowers_for_every_target():
    logits, positions = draw_logits("normal", 7, ODD), np.arange(7, dtype=np.int32)
    sampling = Sampling.of(7, **MIXED)
    flat = lambda logits, positions, *columns: sample(logits, Sampling(*columns), positions)  # noqa: E731
    columns = jax.tree.leaves(sampling)
    exported = jax.export.export(jax.jit(flat), platforms=["cpu", "cuda", "tpu"])(logits, positions, *columns)
    loaded = jax.export.deserialize(exported.serialize())
    tokens = loaded.call(logits, positions, *columns)
    np.testing.assert_array_equal(tokens, run_sample(logits, sampling, positions))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature: expected a number in \[0, .*found -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature.*'hot'"),
        ({"temperature": None}, "temperature.*None"),
        ({"temperature": [0.5, 0.5, 0.5]}, r"or 2 \(one per row\)"),
        ({"temperature": [[0.5, 0.5]]}, "temperature"),
        ({"temperature": [[1.0], [1.0, 2.0]]}, "temperature"),
        ({"top_k": -1}, "top_k: expected an integer"),
        ({"top_k": 2.5}, "top_k: expected an integer"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": [0.5, -1]}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": [1]}, "seed"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message) as caught:
        Sampling.of(2, **options)
    assert isinstance(caught.value, XlatheError | ValueError)
