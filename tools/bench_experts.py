"""How long a grouped product with quantized experts takes, by how many of them are hit: `python -m` this."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.kernels.quantized_dot.cpu_ragged import quantized_ragged_dot

EXPERTS, N, K, CALLS = 64, 768, 2048, 60


def main() -> None:
    """Prints milliseconds, the best of 60 calls with other experts each, one row an expert."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 256, (EXPERTS, N, K // 2)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 1, (EXPERTS, N, K // 32)), jnp.bfloat16)
    run = jax.jit(
        lambda x, sizes: quantized_ragged_dot(x, sizes, codes, scale, out_dtype="float32", bits=4, group=32)
    )
    for hit in (1, 2, 4, 8, 16, 32, 64):
        x = jnp.asarray(rng.normal(size=(hit, K)), jnp.float32)
        seconds = []
        for _ in range(CALLS):
            sizes = np.zeros(EXPERTS, np.int32)
            sizes[rng.choice(EXPERTS, hit, replace=False)] = 1
            start = time.perf_counter()
            run(x, jnp.asarray(sizes)).block_until_ready()
            seconds.append(time.perf_counter() - start)
        print(f"int4, {hit:2} of {EXPERTS} experts of {N} x {K}: {min(seconds) * 1e3:.3f} ms")


if __name__ == "__main__":
    main()
