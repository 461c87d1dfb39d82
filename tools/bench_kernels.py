"""Measures the CPU kernels beside XLA and beside what this machine's memory can deliver.

All cases take turns, so that a disturbance of the machine meets them alike; each line gives the median and
the best of its rounds.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from xlathe.kernels import native
from xlathe.kernels.quantized_dot.cpu import product, quantized_dot, quantized_dot_int4

ROUNDS = 30
K, N = 4096, 11008  # the widest product of a 7B Llama
GROUP = 32  # of 4-bit codes
SMALL_K, SMALL_N = 256, 1024
SMALL_REPEATS = 1000
PREFILL_ROWS = 128


@dataclass
class Case:
    """Something to time: `run()` once does `amount` of work, in `unit` without its "/s"."""

    name: str
    run: Callable[[], object]
    amount: float
    unit: str
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        start = time.perf_counter()
        jax.block_until_ready(self.run())
        self.seconds.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Weight:
    """A weight as the kernels read it and as XLA does.

    codes: int8 [n, k]; scale: float32 [n]; dense: float32 [k, n]; int4: packed codes uint8 [n, k / 2], and scale
    bfloat16 [n, k / GROUP].
    """

    codes: jax.Array
    scale: jax.Array
    dense: jax.Array
    int4: tuple[jax.Array, jax.Array]

    @property
    def int4_bytes(self) -> int:
        return sum(part.nbytes for part in self.int4)


def random_weight(n: int, k: int) -> Weight:
    """Its entries keep the length of a vector about the same over many products."""
    codes = np.random.default_rng(0).integers(-127, 128, (n, k), dtype=np.int8)
    scale = np.full(n, 1 / (74 * np.sqrt(k)), np.float32)
    packed = np.random.default_rng(2).integers(0, 256, (n, k // 2), dtype=np.uint8)
    int4 = (jnp.asarray(packed), jnp.full((n, k // GROUP), 1 / (4.6 * np.sqrt(k)), jnp.bfloat16))
    return Weight(jnp.asarray(codes), jnp.asarray(scale), jnp.asarray((codes * scale[:, None]).T), int4)


def random_rows(m: int, k: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((m, k), np.float32))


def memory_read(nbytes: int) -> Case:
    """XLA's sum of a buffer, which uses all cores and does nothing but wait for memory."""
    buffer, total = jnp.ones(nbytes // 4, jnp.float32), jax.jit(jnp.sum)
    return Case(f"memory read, {nbytes / 1e6:.0f} MB", lambda: total(buffer), nbytes / 1e9, "GB/s")


def decode(weight: Weight, m: int) -> list[Case]:
    """A few rows, in bytes of the weight a second."""
    x, kernel, dot = random_rows(m, K), jax.jit(quantized_dot), jax.jit(jnp.dot)
    w8a8 = jax.jit(
        functools.partial(product, out_dtype="float32", format="int8:channel", activations="int8_token")
    )
    int4, int4_a8 = (jax.jit(functools.partial(quantized_dot_int4, activations=a)) for a in (None, "int8"))
    read, read_dense, read_int4 = (n / 1e9 for n in (weight.codes.nbytes, weight.dense.nbytes, weight.int4_bytes))
    return [
        Case(f"int8 kernel, M = {m}", lambda: kernel(x, weight.codes, weight.scale), read, "GB/s"),
        Case(f"int8 kernel, activations int8, M = {m}", lambda: w8a8(x, weight.codes, weight.scale), read, "GB/s"),
        Case(f"int4 kernel, M = {m}", lambda: int4(x, *weight.int4), read_int4, "GB/s"),
        Case(f"int4 a8 kernel, M = {m}", lambda: int4_a8(x, *weight.int4), read_int4, "GB/s"),
        Case(f"XLA float32, M = {m}", lambda: dot(x, weight.dense), read_dense, "GB/s"),
    ]


def prefill(weight: Weight, m: int) -> list[Case]:
    """Many rows, in floating-point operations a second."""
    return [replace(case, amount=2e-9 * m * K * N, unit="GFLOP/s") for case in decode(weight, m)]


def small() -> list[Case]:
    """One row and a small weight, many times within one program as a decode loop would."""
    weight, x = random_weight(SMALL_N, SMALL_K), random_rows(1, SMALL_K)
    kernel = lambda x: quantized_dot(x, weight.codes, weight.scale)  # noqa: E731
    return [
        Case("int8 kernel", _repeated(kernel, x), SMALL_REPEATS / 1e3, "thousand/s"),
        Case("XLA float32", _repeated(lambda x: x @ weight.dense, x), SMALL_REPEATS / 1e3, "thousand/s"),
    ]


def _repeated(product: Callable[[jax.Array], jax.Array], x: jax.Array) -> Callable[[], jax.Array]:
    step = lambda _, x: product(x)[:, :SMALL_K]  # noqa: E731
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, SMALL_REPEATS, step, x))
    return lambda: loop(x)


def measure(cases: Sequence[Case], rounds: int) -> None:
    """Times every case once a round, after one run of each that compiles it."""
    for case in cases:
        jax.block_until_ready(case.run())
    for _ in range(rounds):
        for case in cases:
            case.measure()


def table(title: str, cases: Sequence[Case]) -> Table:
    """One line a case, all of one unit: its times, and its amount of work a second."""
    unit = cases[0].unit
    result = Table(title=title, title_justify="left")
    for column in ("", "median ms", "best ms", f"median {unit}", f"best {unit}"):
        result.add_column(column, justify="right" if column else "left")
    for case in cases:
        times = (case.median, min(case.seconds))
        rates = (f"{case.amount / seconds:.1f}" for seconds in times)
        result.add_row(case.name, *(f"{seconds * 1e3:.3f}" for seconds in times), *rates)
    return result


def main() -> None:
    weight = random_weight(N, K)
    reads = [memory_read(nbytes) for nbytes in (weight.codes.nbytes, weight.int4_bytes)]
    few = [memory_read(1 << 29), *reads, *(case for m in (1, 2, 4, 8) for case in decode(weight, m))]
    many, little = prefill(weight, PREFILL_ROWS), small()
    measure([*few, *little], ROUNDS)
    measure(many, ROUNDS // 5)

    console = Console()
    console.print(f"instruction sets: {', '.join(native.available_isas())}; {ROUNDS} rounds")
    console.print(table(f"decode: x [M, {K}], weight [{N}, {K}]", few))
    for read, case in zip((*reads, reads[1]), few[3:6], strict=True):
        share = read.median / case.median
        console.print(f"{case.name}: {share:.0%} of the rate at which as many bytes are read (medians)")
    console.print(table(f"prefill: x [{PREFILL_ROWS}, {K}]", many))
    console.print(table(f"{SMALL_REPEATS} products [{SMALL_N}, {SMALL_K}]", little))


if __name__ == "__main__":
    main()
