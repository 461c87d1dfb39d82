"""Measures a grouped product with quantized experts by how many of them are hit, beside XLA's in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from xlathe.kernels.quantized_dot.cpu_ragged import quantized_ragged_dot
from xlathe.tools.bench_kernels import GROUP, ROUNDS, Case, measure, table

EXPERTS, N, K = 64, 768, 2048  # a layer of a small mixture
HIT = (1, 4, 16, 64)


def cases(hit: int, codes: jax.Array, scale: jax.Array, dense: jax.Array) -> list[Case]:
    """One row for each of the experts that are hit, in bytes of their weights a second."""
    rng = np.random.default_rng(hit)
    x = jnp.asarray(rng.normal(size=(hit, K)), jnp.float32)
    sizes = np.zeros(EXPERTS, np.int32)
    sizes[rng.choice(EXPERTS, hit, replace=False)] = 1
    options: dict[str, Any] = {"out_dtype": "float32", "format": f"int4:g{GROUP}"}
    product, ragged = jax.jit(functools.partial(quantized_ragged_dot, **options)), jax.jit(jax.lax.ragged_dot)
    share = hit / EXPERTS / 1e9
    return [
        Case(f"int4 kernel, M = {hit}", lambda: product(x, sizes, codes, scale), codes.nbytes * share, "GB/s"),
        Case(f"XLA float32, M = {hit}", lambda: ragged(x, dense, sizes), dense.nbytes * share, "GB/s"),
    ]


def main() -> None:
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 256, (EXPERTS, N, K // 2)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 1, (EXPERTS, N, K // GROUP)), jnp.bfloat16)
    dense = jnp.ones((EXPERTS, K, N), jnp.float32)
    every = [case for hit in HIT for case in cases(hit, codes, scale, dense)]
    measure(every, ROUNDS)
    Console().print(table(f"x [M, {K}], one row each for M of {EXPERTS} experts [{N}, {K}]", every))


if __name__ == "__main__":
    main()
