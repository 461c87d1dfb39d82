"""The compiled parts of generation: a chunk of prefill, and up to n tokens of decoding.

Both are pure functions of arrays, made from a step graph whose sizes are fixed. All rows of a batch share one
program: a row that is not active computes with the others and writes nowhere.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xlathe.decode.logits import Sampling, sample
from xlathe.graph import Graph
from xlathe.step import State, call_step

Arrays = Mapping[str, jax.Array]
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where each of r rows stands.

    logits: float32 [r, vocab] after the last token; lengths: int32 [r], tokens in the cache; active: bool [r], still
    generating; remaining: int32 [r], tokens that may still be generated.
    """

    logits: jax.Array
    lengths: jax.Array
    active: jax.Array
    remaining: jax.Array


def prefill_unit(step: Graph) -> Callable[..., tuple[jax.Array, State]]:
    """Returns the function that reads one chunk of prompt tokens.

    (arrays, logits [r, vocab], tokens [n], positions [n], rows [n], select [r], finished bool [r], state) ->
    (logits, state): row i takes the logits after chunk token `select[i]` where `finished[i]`. Padding has row r.
    """

    def prefill(
        arrays: Arrays,
        logits: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        rows: jax.Array,
        select: jax.Array,
        finished: jax.Array,
        state: State,
    ) -> tuple[jax.Array, State]:
        args = {"tokens": tokens, "positions": positions, "rows": rows, "select": select}
        new, state = call_step(step, arrays, args, state)
        return jnp.where(finished[:, None], new.astype(logits.dtype), logits), state

    return prefill


def decode_unit(step: Graph, unit: int) -> Callable[..., tuple[jax.Array, Rows, State]]:
    """Returns the function that generates up to `unit` tokens a row without leaving the device.

    (arrays, rows, sampling, stop_tokens int32 [k], limit int32, state) -> (tokens int32 [r, unit], rows, state).
    A token comes from the row's logits, is recorded (a stop token too, as the row's last), and its successor's
    logits are computed. Where a row generated nothing, tokens hold -1.
    """

    def decode(
        arrays: Arrays, rows: Rows, sampling: Sampling, stop_tokens: jax.Array, limit: jax.Array, state: State
    ) -> tuple[jax.Array, Rows, State]:
        count = rows.lengths.shape[0]
        order = jnp.arange(count, dtype=jnp.int32)

        def unfinished(carry: Any) -> jax.Array:
            i, rows, *_ = carry
            return (i < jnp.minimum(limit, unit)) & rows.active.any()

        def one_token(carry: Any) -> Any:
            i, rows, output, state = carry
            token = sample(rows.logits, sampling, rows.lengths)
            output = output.at[:, i].set(jnp.where(rows.active, token, NO_TOKEN))
            remaining = rows.remaining - rows.active
            going_on = rows.active & ~jnp.isin(token, stop_tokens) & (remaining > 0)
            args = {
                "tokens": jnp.where(going_on, token, 0),
                "positions": rows.lengths,
                "rows": jnp.where(going_on, order, count),
                "select": order,
            }
            logits, state = call_step(step, arrays, args, state)
            logits = jnp.where(going_on[:, None], logits.astype(rows.logits.dtype), rows.logits)
            return i + 1, Rows(logits, rows.lengths + going_on, going_on, remaining), output, state

        output = jnp.full((count, unit), NO_TOKEN, jnp.int32)
        _, rows, output, state = lax.while_loop(unfinished, one_token, (jnp.int32(0), rows, output, state))
        return output, rows, state

    return decode
