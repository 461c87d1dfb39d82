"""AutoRound: sign descent by its definition, and that it lowers the error of products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.passes.quantize.methods.autoround import Tuned, rounded, start, tune
from xlathe.passes.quantize.methods.grid import Grid, output_error


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def data() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 64)) @ rng.normal(size=(64, 64)) * np.geomspace(1, 10, 64)
    return jnp.asarray(rng.standard_t(5, size=(24, 64))), jnp.asarray(x.T @ x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_beats_round_to_nearest(bits: int, symmetric: bool) -> None:
    weight, gram = data()
    grid = Grid(bits, 32, symmetric)

    def loss(tuned: Tuned, step: jax.Array) -> jax.Array:
        return output_error(weight, rounded(weight, tuned, grid), gram)

    best, least = tune(start(weight, grid), loss)
    nearest = output_error(weight, grid.nearest(weight, grid.fit(weight)), gram)
    assert least < (0.85 if bits == 2 else 0.95) * nearest
    np.testing.assert_allclose(output_error(weight, rounded(weight, best, grid), gram), least, rtol=1e-9)
    assert np.abs(best.shift).max() <= 0.51


def test_starts_at_round_to_nearest() -> None:
    weight, _ = data()
    grid = Grid(4, 32, False)
    np.testing.assert_array_equal(rounded(weight, start(weight, grid), grid), grid.nearest(weight, grid.fit(weight)))


def test_descends_by_signs() -> None:
    """On |x - target|^2 the iterates are a walk of steps (1 - i / n) / n; the best one stays."""
    target, steps = np.array([0.237, -0.9, 0.013]), 10
    at, walked = np.zeros(3), []
    for i in range(steps):
        walked.append(at)
        at = at - (1 - i / steps) / steps * np.sign(2 * (at - target))
    best, least = tune(jnp.zeros(3), lambda x, step: jnp.sum(jnp.square(x - target)), steps=steps)
    losses = [np.square(x - target).sum() for x in walked]
    np.testing.assert_allclose(best, walked[int(np.argmin(losses))], atol=1e-6)  # rates are float32
    np.testing.assert_allclose(least, min(losses), rtol=1e-4)
