"""The zoo's own claims: decoders are causal and use their context, look-alikes deserve to be refused."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.variants import DECODERS, REFUSED, Variant, as_function, forward

CUT = 5  # length of the prefix whose logits are looked at


def tokens(b: int, t: int, variant: Variant) -> np.ndarray:
    return np.random.default_rng(7).integers(0, variant.vocab, (b, t), dtype=np.int32)


def numpy_forward(build: Variant | Callable[[], object]) -> Callable[[np.ndarray], np.ndarray]:
    run = forward(build)
    return lambda ids: np.asarray(run(ids), np.float32)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def with_another(ids: np.ndarray, position: int, vocab: int) -> np.ndarray:
    changed = ids.copy()
    changed[:, position] = (ids[:, position] + 1) % vocab
    return changed


@pytest.mark.parametrize("variant", DECODERS, ids=repr)
def test_decoder(variant):
    run, whole = numpy_forward(variant), tokens(3, 12, variant)
    logits, changed = run(whole), run(with_another(whole, CUT, variant.vocab))
    assert logits.shape == (3, 12, variant.vocab) and np.isfinite(logits).all()
    assert relative(changed[:, :CUT], logits[:, :CUT]) < 1e-6
    later = relative(changed[:, CUT + 1 :], logits[:, CUT + 1 :])
    assert later > 1e-2 if variant.layers else later == 0
    assert relative(run(whole[:2, :CUT]), logits[:2, :CUT]) < variant.rtol


@pytest.mark.parametrize("variant", [v for v in DECODERS if 0 < v.window < 20], ids=repr)
def test_window_is_as_wide_as_it_says(variant):
    run, whole = numpy_forward(variant), tokens(1, 2 * variant.window, variant)
    differs = (run(whole) != run(with_another(whole, 0, variant.vocab))).any(axis=(0, 2))
    reach = variant.layers * (variant.window - 1)
    assert differs[reach] and not differs[reach + 1 :].any()


def test_window_of_4096():
    (variant,) = [v for v in DECODERS if v.window == 4096]
    run, whole = numpy_forward(variant), tokens(1, 4100, variant)
    differs = (run(whole) != run(with_another(whole, 0, variant.vocab))).any(axis=(0, 2))
    assert differs[4000:4096].any() and not differs[4096:].any()


@pytest.mark.parametrize("variant", [v for v in DECODERS if v.twin], ids=repr)
def test_equals_its_plain_twin(variant):
    whole = tokens(3, 12, variant)
    assert relative(numpy_forward(variant)(whole), numpy_forward(variant.twin)(whole)) < 1e-5


@pytest.mark.parametrize("variant", REFUSED, ids=repr)
def test_refusal_is_warranted(variant):
    """Logits of a prefix depend on what follows, or else the operation would need a state."""
    run, whole = numpy_forward(variant), tokens(3, 12, variant)
    prefix = run(whole)[:, :CUT]
    sees_later = relative(run(with_another(whole, CUT, variant.vocab))[:, :CUT], prefix) > 1e-3
    # Compiling another length is the costly part of this test.
    assert (sees_later or relative(run(whole[:, :CUT]), prefix) > 1e-3) != variant.causal


@pytest.mark.parametrize("variant", REFUSED, ids=repr)
def test_refused_line_is_marked(variant):
    file, line = variant.refused_at
    assert file.endswith(".py") and line > 1 and variant.reason


@pytest.mark.parametrize("variant", DECODERS + REFUSED, ids=repr)
def test_symbolic_flag(variant):
    function, weights = as_function(variant.build())
    limits = ["b >= 1", "t >= 1", f"t <= {variant.max_len}"]
    b, t = jax.export.symbolic_shape("b, t", constraints=limits)
    ids = jax.ShapeDtypeStruct((b, t), jnp.int32)
    if variant.symbolic:
        assert jax.make_jaxpr(function)(weights, ids).out_avals[0].shape == (b, t, variant.vocab)
    else:
        with pytest.raises((TypeError, ValueError, jax.errors.InconclusiveDimensionOperation)):
            jax.make_jaxpr(function)(weights, ids)


def test_names_are_unique():
    names = [variant.name for variant in DECODERS + REFUSED]
    assert len(set(names)) == len(names)
