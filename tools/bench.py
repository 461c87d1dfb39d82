"""Measures the CPU kernels beside XLA and beside what this machine's memory can deliver.

All cases take turns, so that a disturbance of the machine meets them alike; each line gives the median and
the best of its rounds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from xlathe.kernels import native
from xlathe.kernels.quantized_dot.cpu import quantized_dot

ROUNDS = 30
K, N = 4096, 11008  # the widest product of a 7B Llama
SMALL_K, SMALL_N = 256, 1024
SMALL_REPEATS = 1000
PREFILL_ROWS = 128


@dataclass
class Case:
    """Something to time: `run()` once is `amount` units (bytes, operations, products) of work."""

    name: str
    run: Callable[[], object]
    amount: float
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        start = time.perf_counter()
        jax.block_until_ready(self.run())
        self.seconds.append(time.perf_counter() - start)


def memory_read(nbytes: int) -> Case:
    """XLA's sum of a buffer, which uses all cores and does nothing but wait for memory."""
    buffer, total = jnp.ones(nbytes // 4, jnp.float32), jax.jit(jnp.sum)
    return Case(f"memory read, {nbytes / 1e6:.0f} MB", lambda: total(buffer), nbytes)


def products(rows: int) -> list[Case]:
    """x [rows, K] times a weight [N, K], by the kernel and by XLA; the amount is the weight's bytes."""
    x, codes, scale = _operands(rows, K, N)
    weight = jnp.asarray((codes * scale[:, None]).T)
    by_kernel, by_xla = jax.jit(quantized_dot), jax.jit(jnp.dot)
    return [
        Case(f"int8 kernel, M = {rows}", lambda: by_kernel(x, codes, scale), codes.nbytes),
        Case(f"XLA float32, M = {rows}", lambda: by_xla(x, weight), weight.nbytes),
    ]


def small_products() -> list[Case]:
    """One row times a weight [SMALL_N, SMALL_K], many times within one program as a decode loop would."""
    x, codes, scale = _operands(1, SMALL_K, SMALL_N)
    weight = jnp.asarray((codes * scale[:, None]).T)
    return [
        Case("int8 kernel", _repeated(lambda x: quantized_dot(x, codes, scale), x), SMALL_REPEATS),
        Case("XLA float32", _repeated(lambda x: x @ weight, x), SMALL_REPEATS),
    ]


def _repeated(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> Callable[[], jax.Array]:
    step = lambda _, x: product(x)[:, :SMALL_K]  # noqa: E731
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, SMALL_REPEATS, step, x))
    return lambda: loop(x)


def _operands(m: int, k: int, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (n, k), dtype=np.int8)
    scale = np.full(n, 1 / (74 * np.sqrt(k)), np.float32)  # keeps the length of x over many products
    return jnp.asarray(rng.standard_normal((m, k), np.float32)), jnp.asarray(codes), jnp.asarray(scale)


def measure(cases: Sequence[Case], rounds: int) -> None:
    """Times every case once a round, after one run of each that compiles it."""
    for case in cases:
        jax.block_until_ready(case.run())
    for _ in range(rounds):
        for case in cases:
            case.measure()


def table(title: str, rate: str, cases: Sequence[Case], value: Callable[[float, Case], float]) -> Table:
    """One line a case: the median and the best of its times, and of `value(seconds, case)`."""
    result = Table(title=title, title_justify="left")
    for column in ("", "median ms", "best ms", f"median {rate}", f"best {rate}"):
        result.add_column(column, justify="right" if column else "left")
    for case in cases:
        times = (float(np.median(case.seconds)), min(case.seconds))
        values = (f"{value(seconds, case):.1f}" for seconds in times)
        result.add_row(case.name, *(f"{seconds * 1e3:.3f}" for seconds in times), *values)
    return result


def main() -> None:
    reads = [memory_read(1 << 29), memory_read(K * N)]
    decode = [case for rows in (1, 2, 4, 8) for case in products(rows)]
    prefill = products(PREFILL_ROWS)
    small = small_products()
    measure([*reads, *decode, *small], ROUNDS)
    measure(prefill, ROUNDS // 5)

    def bandwidth(seconds: float, case: Case) -> float:
        return case.amount / seconds / 1e9

    console = Console()
    console.print(f"instruction sets: {', '.join(native.available_isas())}; {ROUNDS} rounds")
    console.print(table(f"decode: x [M, {K}], weight [{N}, {K}]", "GB/s", [*reads, *decode], bandwidth))
    share = bandwidth(np.median(decode[0].seconds), decode[0]) / bandwidth(
        np.median(reads[1].seconds), reads[1]
    )
    console.print(f"int8 kernel, M = 1: {share:.0%} of the rate at which as many bytes are read (medians)\n")
    gflops = lambda seconds, case: 2e-9 * PREFILL_ROWS * K * N / seconds  # noqa: E731
    console.print(table(f"prefill: x [{PREFILL_ROWS}, {K}]", "GFLOP/s", prefill, gflops))
    microseconds = lambda seconds, case: seconds / case.amount * 1e6  # noqa: E731
    console.print(table(f"{SMALL_REPEATS} products [{SMALL_N}, {SMALL_K}]", "us each", small, microseconds))


if __name__ == "__main__":
    main()
