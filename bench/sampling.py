"""Microseconds a call of `sample`, beside a sort and a top-k of the same logits, inside a compiled loop.

Each figure is the median of several runs of a loop whose every turn depends on the one before. Logits are
normal with a deviation of 5 (a peaked law) or 2 (a flat one, whose nucleus is larger than the head that is
searched first).

    python bench/sampling.py
"""

import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from xlathe.decode.logits import Sampling, sample

RUNS = 7
SECONDS = 0.1  # of one run

Work = Callable[[Array, Array], Array]  # (logits [R, V], step int32 []) -> any array


def microseconds(work: Work, logits: Array) -> float:
    """Returns the median time of one call of `work`."""

    def turn(step: Array, logits: Array) -> Array:
        return logits + 1e-30 * work(logits, step).sum().astype(jnp.float32)

    loop = jax.jit(lambda turns, logits: lax.fori_loop(0, turns, turn, logits))

    def seconds(turns: int) -> float:
        start = time.perf_counter()
        loop(turns, logits).block_until_ready()
        return time.perf_counter() - start

    seconds(1)
    turns = max(1, round(SECONDS / min(seconds(1) for _ in range(3))))
    turns = max(1, round(turns * SECONDS / seconds(turns)))
    return 1e6 * statistics.median(seconds(turns) for _ in range(RUNS)) / turns


def draw(rows: int, **options: float) -> Work:
    sampling = Sampling.of(rows, **options)
    return lambda logits, step: sample(logits, sampling, jnp.full(rows, step))


def works(rows: int) -> dict[str, Work]:
    return {
        "greedy": draw(rows),
        "plain": draw(rows, temperature=1.0),
        "top-k 50": draw(rows, temperature=1.0, top_k=50),
        "top-p .9": draw(rows, temperature=1.0, top_p=0.9),
        "both": draw(rows, temperature=1.0, top_k=50, top_p=0.9),
        "argmax": lambda logits, _: jnp.argmax(logits, -1),
        "lax.top_k 50": lambda logits, _: lax.top_k(logits, 50)[0],
        "sort": lambda logits, _: jnp.sort(logits, -1),
    }


def main() -> None:
    print("".join(f"{name:>13}" for name in ["V", "R", "deviation", *works(1)]))
    for vocab, rows, deviation in itertools.product([4096, 32000, 128256], [1, 4], [5, 2]):
        logits = deviation * jax.random.normal(jax.random.key(0), (rows, vocab))
        times = [microseconds(work, logits) for work in works(rows).values()]
        print("".join(f"{cell:>13}" for cell in [vocab, rows, deviation]), end="")
        print("".join(f"{value:13.1f}" for value in times), flush=True)


if __name__ == "__main__":
    main()
