"""AutoRound: sign descent by its definition, and that it lowers the error of products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.passes.quantize.algorithms.autoround import (
    Ranges,
    Tuned,
    choose,
    ranges_of,
    stands_for,
    start,
    tune,
)
from xlathe.passes.quantize.algorithms.blocks import output_error, rounded
from xlathe.storage import Scaled, parse_format


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def data() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 64)) @ rng.normal(size=(64, 64)) * np.geomspace(1, 10, 64)
    return jnp.asarray(rng.standard_t(5, size=(24, 64))), jnp.asarray(x.T @ x)


@pytest.mark.parametrize("text", ["int2:g32,asym", "int4:g32"])
def test_beats_round_to_nearest(text: str) -> None:
    weight, gram = data()
    stored = parse_format(text)

    ranges = Ranges(*stored.bounds(weight))

    def loss(tuned: Tuned) -> jax.Array:
        return output_error(weight, stands_for(weight, ranges, tuned, stored), gram)

    best, least = tune(start(weight, ranges), lambda tuned, step: jax.value_and_grad(loss)(tuned))
    nearest = output_error(weight, rounded(weight, stored.fit(weight), stored), gram)
    assert least < (0.85 if "int2" in text else 0.95) * nearest
    levels, steps = choose(weight, ranges, best, stored)
    found = stored.values(levels, *stored.spread(steps, weight.shape))
    np.testing.assert_allclose(output_error(weight, found, gram), least, rtol=1e-9)
    assert np.abs(best.shift).max() <= 0.51


@pytest.mark.parametrize("text", ["int4:g32", "int3:g32,asym"])
def test_starts_at_round_to_nearest(text: str) -> None:
    weight, _ = data()
    stored = parse_format(text)
    for ranges in (Ranges(*stored.bounds(weight)), ranges_of(stored.fit(weight), stored)):
        found = stands_for(weight, ranges, start(weight, ranges), stored)
        np.testing.assert_allclose(found, rounded(weight, stored.fit(weight), stored), rtol=1e-12)


def test_gradients_are_those_without_rounding() -> None:
    """d value / d shift is the scale; d value / d range is (level - zero) * d scale, less what moves the level."""
    weight, _ = data()
    stored = Scaled("int4", 1, 32, "f32")
    ranges = Ranges(*stored.bounds(weight))
    tuned = start(weight, ranges)
    scale, _ = stored.spread(stored.fit(weight), weight.shape)
    gradient = jax.grad(lambda t: stands_for(weight, ranges, t, stored).sum())(tuned)
    steps = weight / scale
    levels = jnp.clip(jnp.round(steps), -8, 7)
    np.testing.assert_allclose(gradient.shift, jnp.where(jnp.abs(levels - steps) <= 1, scale, 0), rtol=1e-9)


def test_descends_by_signs() -> None:
    """On |x - target|^2 the iterates are a walk of steps (1 - i / n) / n; the best one stays."""
    target, steps = np.array([0.237, -0.9, 0.013]), 10
    at, walked = np.zeros(3), []
    for i in range(steps):
        walked.append(at)
        at = at - (1 - i / steps) / steps * np.sign(2 * (at - target))
    best, least = tune(
        jnp.zeros(3), lambda x, step: jax.value_and_grad(lambda x: jnp.sum(jnp.square(x - target)))(x), steps
    )
    losses = [np.square(x - target).sum() for x in walked]
    np.testing.assert_allclose(best, walked[int(np.argmin(losses))], atol=1e-6)  # rates are float32
    np.testing.assert_allclose(least, min(losses), rtol=1e-4)
