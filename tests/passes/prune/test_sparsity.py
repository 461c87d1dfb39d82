"""Magnitude, Wanda and SparseGPT against NumPy written out from the papers, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe.passes.prune.algorithms.magnitude import magnitude
from xlathe.passes.prune.algorithms.sparsegpt import Grid, sparsegpt, sparsegpt_rounded
from xlathe.passes.prune.algorithms.sparsity import Sparsity
from xlathe.passes.prune.algorithms.wanda import wanda
from xlathe.storage import Scaled, parse_format

ROWS, COLUMNS = 16, 96
HALF, TWO_OF_FOUR = Sparsity(0.5), Sparsity(0.5, 2, 4)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def weight(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, COLUMNS))


def activations(seed: int = 1) -> np.ndarray:
    """Float64 [tokens, columns], correlated, of different sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(400, COLUMNS)) @ (np.eye(COLUMNS) + 0.15 * rng.normal(size=(COLUMNS, COLUMNS)))
    return mixed * np.exp(rng.normal(size=COLUMNS))


def pruned(method: str, sparsity: Sparsity, seed: int = 0) -> np.ndarray:
    w, x = weight(seed), activations(seed + 1)
    if method == "magnitude":
        return magnitude(w, sparsity)
    if method == "wanda":
        return wanda(w, (x**2).sum(0), sparsity)
    return np.asarray(sparsegpt(w, x.T @ x, sparsity, block=32)[0])


def written_out(
    w: np.ndarray, gram: np.ndarray, sparsity: Sparsity, block: int, scales: np.ndarray | None = None
) -> np.ndarray:
    """Optimal Brain Surgeon, a column at a time, with the inverse Hessian of the columns that are left.

    scales: [n, k], of 4-bit integers that what stays is rounded to, or None.
    """
    w, gone = w.copy(), np.zeros(w.shape, bool)
    inverse = np.linalg.inv(gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(COLUMNS))
    schur = inverse.copy()
    left = np.zeros(COLUMNS)  # [H^-1]_jj when all columns before j are gone
    for j in range(COLUMNS):
        left[j] = schur[j, j]
        schur -= np.outer(schur[:, j], schur[j]) / schur[j, j]
    for j in range(COLUMNS):
        if sparsity.of and j % sparsity.of == 0:
            score = w[:, j : j + sparsity.of] ** 2 / left[j : j + sparsity.of]
            for row, order in enumerate(np.argsort(score, axis=1)):
                gone[row, j + order[: sparsity.of - sparsity.keep]] = True
        elif not sparsity.of and j % block == 0:
            score = w[:, j : j + block] ** 2 / left[j : j + block]
            before, after = (round(sparsity.fraction * ROWS * columns) for columns in (j, j + score.shape[1]))
            last = np.sort(score.ravel())[after - before - 1]
            gone[:, j : j + block] = score <= last
        stays = w[:, j] if scales is None else scales[:, j] * np.clip(np.rint(w[:, j] / scales[:, j]), -8, 7)
        value = np.where(gone[:, j], 0, stays)
        w -= np.outer((w[:, j] - value) / inverse[j, j], inverse[j])
        w[:, j] = value
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w


@pytest.mark.parametrize("sparsity", [HALF, Sparsity(0.7), TWO_OF_FOUR, Sparsity(2 / 3, 1, 3)], ids=str)
@pytest.mark.parametrize("block", [24, 36])
def test_sparsegpt_is_optimal_brain_surgeon(sparsity: Sparsity, block: int) -> None:
    gram = activations().T @ activations()
    found, damping = sparsegpt(weight(), gram, sparsity, block=block)
    assert damping == 0.01
    np.testing.assert_allclose(found, written_out(weight(), gram, sparsity, block), atol=1e-9)


def grid_of(w: np.ndarray) -> Grid:
    stored = parse_format("int4:g32")
    assert isinstance(stored, Scaled)
    return Grid(stored, stored.fit(jnp.asarray(w)))


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR], ids=str)
def test_rounding_is_made_good_column_by_column(sparsity: Sparsity) -> None:
    w, gram = weight(), activations().T @ activations()
    groups = w.reshape(ROWS, -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    scales = np.repeat(np.asarray(jnp.asarray(largest / -8, jnp.bfloat16), np.float64), 32, axis=1)
    found, _ = sparsegpt(w, gram, sparsity, grid=grid_of(w), block=24)
    np.testing.assert_allclose(found, written_out(w, gram, sparsity, 24, scales), atol=1e-9)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_as_it_goes_has_less_error_than_after(sparsity: Sparsity, seed: int) -> None:
    w, x = weight(seed), activations(seed + 1)
    zeroed = np.asarray(pruned("sparsegpt", sparsity, seed))
    grid = grid_of(zeroed)
    after = np.asarray(grid.stored.values(grid.levels(zeroed), *grid.stored.spread(grid.steps, w.shape)))
    joint = np.asarray(sparsegpt(w, x.T @ x, sparsity, grid=grid, block=32)[0])
    error = [np.square(x @ (each - w).T).sum() for each in (joint, after)]
    assert error[0] < error[1]
    assert (joint == 0).sum() >= w.size // 2


@pytest.mark.parametrize("form", ["", "int4:b4x32"])
def test_rows_of_a_pattern_go_some_at_a_time(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: 16 rows at once. Expected: 6 at a time, or 4 that share a scale, make the same."""
    gram = activations().T @ activations()
    stored = parse_format(form) if form else None
    grid = Grid(stored, stored.fit(jnp.asarray(weight()))) if isinstance(stored, Scaled) else None
    whole, _ = sparsegpt(weight(), gram, TWO_OF_FOUR, grid=grid)
    monkeypatch.setattr("xlathe.passes.quantize.algorithms.gptq.AT_ONCE", 6 * COLUMNS)
    some, _ = sparsegpt(weight(), gram, TWO_OF_FOUR, grid=grid)
    np.testing.assert_allclose(some, whole, atol=1e-12)


def test_scales_reach_what_stays_without_rounding() -> None:
    gram = activations().T @ activations()
    kept, _ = sparsegpt(weight(), gram, TWO_OF_FOUR)
    grid = grid_of(np.asarray(kept))
    found, own = sparsegpt_rounded(weight(), gram, TWO_OF_FOUR, grid.stored)
    np.testing.assert_array_equal(own.steps.scale, grid.steps.scale)
    np.testing.assert_array_equal(found, sparsegpt(weight(), gram, TWO_OF_FOUR, grid=grid)[0])


def test_wanda_compares_a_row_and_magnitude_all() -> None:
    w, squares = weight(), (activations() ** 2).sum(0)
    rows = np.abs(w) * np.sqrt(squares)
    assert np.array_equal(wanda(w, squares, HALF), np.where(rows >= np.median(rows, axis=1, keepdims=True), w, 0))
    assert np.array_equal(magnitude(w, HALF), np.where(np.abs(w) >= np.median(np.abs(w)), w, 0))


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_a_method_knows_lowers_its_error(sparsity: Sparsity, seed: int) -> None:
    w, x = weight(seed), activations(seed + 1)
    methods = ("sparsegpt", "wanda", "magnitude")
    errors = [np.square(x @ (pruned(method, sparsity, seed) - w).T).sum() for method in methods]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (1, 3), (5, 8)])
def test_patterns_are_exact(method: str, keep: int, of: int) -> None:
    groups = pruned(method, Sparsity(1 - keep / of, keep, of)).reshape(ROWS, -1, of)
    assert ((groups != 0).sum(-1) == keep).all()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_equal_weights_are_counted_exactly(method: str) -> None:
    w, x = np.ones((ROWS, COLUMNS)), np.eye(COLUMNS)
    found = {"magnitude": lambda: magnitude(w, HALF), "wanda": lambda: wanda(w, x.sum(0), HALF)}
    result = found.get(method, lambda: sparsegpt(w, x, HALF, block=36)[0])()
    assert (np.asarray(result) == 0).sum() == w.size // 2


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_zeros_of_a_matrix_are_known_whatever_is_compared(method: str) -> None:
    """Before: 0.31 of 96 columns, of 16 rows of 32, and of all, are no whole numbers."""
    found = pruned(method, Sparsity(0.31))
    assert (found == 0).sum() == round(0.31 * ROWS * COLUMNS)
    if method == "wanda":
        assert {*(found == 0).sum(1)} == {29, 30}


def test_blocks_do_not_change_a_pattern() -> None:
    gram = activations().T @ activations()
    one, *others = (sparsegpt(weight(), gram, TWO_OF_FOUR, block=block)[0] for block in (4, 10, 32, 96, 128))
    for other in others:
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("sparsity", [HALF, TWO_OF_FOUR], ids=str)
def test_a_factor_of_the_hessian_changes_nothing(sparsity: Sparsity) -> None:
    """Before: some inputs are always zero. Expected: their weights go first, in any unit."""
    gram = activations().T @ activations()
    gram[8:12], gram[:, 8:12] = 0, 0
    one, other = (np.asarray(sparsegpt(weight(), gram * unit, sparsity)[0]) for unit in (1, 2.0**-20))
    np.testing.assert_allclose(one, other, atol=1e-12)
    assert (one[:, 8:12] == 0).mean() == (1 if sparsity is HALF else 0.5)
