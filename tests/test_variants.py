"""The zoo's own claims: every decoder is causal, uses its context, and traces as its flag says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.variants import DECODERS, REFUSED, Variant, as_function, forward


def tokens(variant: Variant, b: int, t: int) -> np.ndarray:
    return np.random.default_rng(b * 100 + t).integers(0, variant.vocab, (b, t), dtype=np.int32)


def relative(difference: jax.Array, reference: jax.Array) -> float:
    return float(jnp.max(jnp.abs(difference)) / jnp.max(jnp.abs(reference)))


def changed(before: np.ndarray, position: int, vocab: int) -> np.ndarray:
    after = before.copy()
    after[:, position] = (after[:, position] + 1) % vocab
    return after


@pytest.mark.parametrize("variant", DECODERS, ids=repr)
def test_decoder_is_causal_and_uses_its_context(variant):
    run, cut = forward(variant), 5
    for b, t in [(1, 1), (2, 5)]:
        logits = run(tokens(variant, b, t))
        assert logits.shape == (b, t, variant.vocab) and bool(jnp.isfinite(logits).all())
    before = tokens(variant, 3, 12)
    logits, other = run(before), run(changed(before, cut, variant.vocab))
    assert bool(jnp.isfinite(logits).all())
    assert relative(other[:, :cut] - logits[:, :cut], logits) < 1e-6
    later = relative(other[:, cut + 1 :] - logits[:, cut + 1 :], logits)
    assert later > 1e-2 if variant.layers else later == 0


@pytest.mark.parametrize("variant", DECODERS, ids=repr)
def test_prefix_is_independent_of_the_length(variant):
    run, whole = forward(variant), tokens(variant, 2, 12)
    assert relative(run(whole)[:, :5] - run(whole[:, :5]), run(whole)) < variant.rtol


@pytest.mark.parametrize("variant", DECODERS + REFUSED, ids=repr)
def test_symbolic_flag(variant):
    function, weights = as_function(variant.build())
    limits = ["b >= 1", "t >= 1", f"t <= {variant.max_len}"]
    b, t = jax.export.symbolic_shape("b, t", constraints=limits)
    trace = lambda: jax.make_jaxpr(function)(weights, jax.ShapeDtypeStruct((b, t), jnp.int32))  # noqa: E731
    if variant.symbolic:
        assert trace().out_avals[0].shape == (b, t, variant.vocab)
    else:
        with pytest.raises((jax.errors.JAXTypeError, jax.errors.JAXIndexError, TypeError, ValueError)):
            trace()


@pytest.mark.parametrize("variant", REFUSED, ids=repr)
def test_refusal_is_warranted(variant):
    run, whole = forward(variant), tokens(variant, 2, 12)
    prefix = relative(run(whole)[:, :5] - run(whole[:, :5]), run(whole))
    assert prefix < 1e-5 if variant.causal else prefix > 1e-3


@pytest.mark.parametrize("variant", REFUSED, ids=repr)
def test_refused_line_is_in_the_source(variant):
    file, line = variant.refused_at
    assert file.endswith(".py") and line > 0 and variant.reason
