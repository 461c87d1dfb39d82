"""Look-ups in which every row and token reads its own entries get paired axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlathe import jaxpr as ir
from xlathe.own_entries import pair_own_entries

OUTPUTS = jax.ShapeDtypeStruct((4, 2, 3, 5), jnp.float32)  # of 4 experts, for 2 rows of 3 tokens
CHOSEN = jax.ShapeDtypeStruct((2, 3, 2), jnp.int32)


def look_up(rows, places):
    def look(outputs, chosen):
        return outputs[chosen, rows(chosen)[:, None, None], places(chosen)[None, :, None]]

    return look


def rows(chosen):
    return jnp.arange(chosen.shape[0])


def places(chosen):
    return jnp.arange(chosen.shape[1])


def paired_axes(function):
    jaxpr = ir.inline_calls(ir.trace(function, OUTPUTS, CHOSEN), lambda eqn: True)
    after, count = pair_own_entries(jaxpr)
    rng = np.random.default_rng(0)
    operands = rng.normal(size=OUTPUTS.shape).astype(np.float32), rng.integers(0, 2, CHOSEN.shape, np.int32)
    np.testing.assert_array_equal(ir.evaluate(after, operands)[0], function(*operands))
    (gather,) = [e for e in after.eqns if e.primitive.name == "gather"]
    numbers = gather.params["dimension_numbers"]
    assert count == bool(numbers.operand_batching_dims)
    return numbers.operand_batching_dims, numbers.start_indices_batching_dims


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (look_up(rows, places), ((1, 2), (0, 1))),
        (look_up(lambda c: rows(c)[::-1], places), ((2,), (1,))),  # other rows
        (look_up(rows, lambda c: places(c) // 2), ((1,), (0,))),  # the token before
        (look_up(rows, lambda c: jnp.maximum(places(c) - 1, 0)), ((1,), (0,))),
        (look_up(rows, lambda c: c[0, :, 0]), ((1,), (0,))),  # places that are looked up themselves
    ],
)
def test_pairs_what_counts(function, expected):
    assert paired_axes(function) == expected


def test_an_index_that_counts_along_another_axis_stays():
    """Row i of the result reads row j: as many tokens as rows, counted along the tokens."""
    square = jax.ShapeDtypeStruct((4, 3, 3, 5), jnp.float32), jax.ShapeDtypeStruct((3, 3, 2), jnp.int32)

    def transposed(outputs, chosen):
        return outputs[chosen, jnp.arange(3)[None, :, None], jnp.arange(3)[:, None, None]]

    after, count = pair_own_entries(ir.inline_calls(ir.trace(transposed, *square), lambda eqn: True))
    rng = np.random.default_rng(1)
    operands = rng.normal(size=square[0].shape).astype(np.float32), rng.integers(0, 4, square[1].shape, np.int32)
    np.testing.assert_array_equal(ir.evaluate(after, operands)[0], transposed(*operands))
    assert count == 1
