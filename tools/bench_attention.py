"""Measures cached_attention on CPU by what a token sees: its cost grows with that, and not with the cache.

For each layout and dtype of the cache, one new token of one row; beside it XLA's own attention, which is given a
contiguous float32 cache and reads all of it, and the rate at which this machine reads memory.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from xlathe.kernels.cached_attention.cpu import cached_attention
from xlathe.ops.write_slots import quantize_heads
from xlathe.tools.bench_kernels import Case, measure, memory_read

ROUNDS = 20
CAPACITY, SEEN = 4096, (64, 512, 4096)  # slots of a row; tokens in them
KV_HEADS, GROUP, HEAD = 8, 4, 64  # of a 1B Llama
PAGE = 16
LAYERS = 16  # caches that take turns, as the layers of a model do: together more than a core's own cache
PROMPT = 128  # tokens of a chunk of a prompt
PROMPT_SEEN = (PROMPT, 512, 4096)
FORMS = [(layout, codes) for layout in ("contiguous", "ring", "paged") for codes in (False, True)]
Attend = Callable[[jax.Array, jax.Array], object]  # of q and positions, in every layer: one program, as in a model


def random_heads(seed: int) -> jax.Array:
    """Keys or values of one row, float32 [CAPACITY, KV_HEADS, HEAD]."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((CAPACITY, KV_HEADS, HEAD), np.float32))


def kernel(layout: str, codes: bool) -> Attend:
    """The kernel over LAYERS caches of one row; pages lie in no order."""
    lead = (CAPACITY // PAGE, PAGE) if layout == "paged" else (1, CAPACITY)
    order = np.random.default_rng(0).permutation(lead[0])[None]
    table = jnp.asarray(order, jnp.int32) if layout == "paged" else None
    parts = [quantize_heads(random_heads(i)) if codes else (random_heads(i),) for i in range(2 * LAYERS)]
    kept = [[part.reshape(*lead, *part.shape[1:]) for part in pair] for pair in parts]
    window = CAPACITY if layout == "ring" else None
    attend = functools.partial(cached_attention, scale=HEAD**-0.5, window=window, layout=layout, table=table)

    @jax.jit
    def run(q: jax.Array, positions: jax.Array, kept: list[list[jax.Array]]) -> list[jax.Array]:
        return [
            attend(q, k[0], v[0], jnp.zeros_like(positions), positions, scales=(k[1], v[1]) if codes else None)
            for k, v in itertools.batched(kept, 2)
        ]

    return lambda q, positions: run(q, positions, kept)


def xla() -> Attend:
    """jax.nn.dot_product_attention over the whole capacity, with a mask: what does not know the length in advance."""
    kept = [random_heads(i)[None] for i in range(2 * LAYERS)]

    @jax.jit
    def run(q: jax.Array, positions: jax.Array, kept: list[jax.Array]) -> list[jax.Array]:
        queries = q.reshape(1, -1, KV_HEADS * GROUP, HEAD)
        mask = (jnp.arange(CAPACITY) <= positions[:, None])[None, None]
        return [jax.nn.dot_product_attention(queries, k, v, mask=mask) for k, v in itertools.batched(kept, 2)]

    return lambda q, positions: run(q, positions, kept)


def over_layers(name: str, attend: Attend, tokens: int, seen: int, unit: str, amount: float) -> Case:
    """All layers once, for `tokens` tokens of which the last sees `seen`."""
    q = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, KV_HEADS, GROUP, HEAD), np.float32))
    positions = jnp.arange(seen - tokens, seen, dtype=jnp.int32)
    return Case(name, lambda: attend(q, positions), amount, unit)


def bytes_read(codes: bool, seen: int) -> int:
    """Of keys and values of one layer."""
    return 2 * seen * KV_HEADS * (HEAD + 4 if codes else 4 * HEAD)  # a scale has 4


def decode(attends: dict[str, tuple[Attend, bool]], seen: int) -> list[Case]:
    return [
        over_layers(name, attend, 1, seen, "GB/s", LAYERS * bytes_read(codes, seen) / 1e9)
        for name, (attend, codes) in attends.items()
    ]


def prefill(attends: dict[str, tuple[Attend, bool]], seen: int) -> list[Case]:
    flops = 4 * PROMPT * (seen - PROMPT / 2) * KV_HEADS * GROUP * HEAD * LAYERS
    return [over_layers(name, attend, PROMPT, seen, "GFLOP/s", flops / 1e9) for name, (attend, _) in attends.items()]


def table(title: str, sizes: Sequence[int], columns: Sequence[Sequence[Case]], tokens: int) -> Table:
    """A line a cache; for each number of seen tokens microseconds a token and layer, and work a second; medians."""
    result = Table(title=title, title_justify="left")
    for name in ["", *(text for n in sizes for text in (f"{n}: µs", columns[0][0].unit))]:
        result.add_column(name, justify="right" if name else "left")
    for cases in zip(*columns, strict=True):
        cells = ((case.median / LAYERS / tokens * 1e6, case.amount / case.median) for case in cases)
        result.add_row(cases[0].name, *(text for µs, rate in cells for text in (f"{µs:.1f}", f"{rate:.1f}")))
    return result


def main() -> None:
    attends = {f"{layout}, {'int8' if codes else 'float32'}": (kernel(layout, codes), codes) for layout, codes in FORMS}
    attends["XLA, contiguous, float32"] = (xla(), False)
    read = memory_read(LAYERS * bytes_read(False, CAPACITY))
    columns = [decode(attends, seen) for seen in SEEN]
    measure([read, *(case for column in columns for case in column)], ROUNDS)
    chosen = {name: attends[name] for name in ("contiguous, float32", "paged, int8", "XLA, contiguous, float32")}
    chunks = [prefill(chosen, seen) for seen in PROMPT_SEEN]
    measure([case for column in chunks for case in column], ROUNDS // 5)

    heads = f"{KV_HEADS} key-value heads of {HEAD}, {GROUP} query heads each"
    console = Console()
    console.print(f"memory read: {read.amount / read.median:.1f} GB/s")
    console.print(table(f"decode: one token sees n of {CAPACITY} slots; a token and layer; {heads}", SEEN, columns, 1))
    title = f"prefill: {PROMPT} tokens, the last sees n of {CAPACITY}; a token and layer"
    console.print(table(title, PROMPT_SEEN, chunks, PROMPT))


if __name__ == "__main__":
    main()
