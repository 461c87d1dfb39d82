"""attention on Hopper GPUs: Pallas on Mosaic GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from xlathe.errors import OptionError
from xlathe.kernels.attention import coverage
from xlathe.kernels.hopper import product, tiled
from xlathe.kernels.online_softmax import LOWEST, Rows, absorb, finish
from xlathe.kernels.tiles import round_up
from xlathe.ops.attention import cap_scores

# Of a tile of scores: what one warp group multiplies at once. Two tiles and what they need fit into one multiprocessor.
QUERIES, KEYS = 64, 64
STAGES = 2  # blocks of keys and values on their way

uncovered = functools.partial(coverage.uncovered, head_sizes=(64, 128), dtypes=("bfloat16",))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *terms: jax.Array,
    interpret: plgpu.InterpretGPUParams | None = None,
    **options: Any,
) -> jax.Array:
    """`xlathe.ops.attention`, a tile of queries by keys at a time (Dao et al. 2022).

    Tiles that the mask hides are neither read nor computed. A query that sees no key gets zeros; in the reference body
    it gets the mean of all values. Neither is used.

    Args:
      q: bfloat16 [b, t, k, g, d]; d is 64 or 128.
      k: bfloat16 [b, s, k, d].
      v: bfloat16 [b, s, k, e]; e is 64 or 128.
      terms: the mask, bool [b | 1, 1, 1, t | 1, s | 1], where there is one.
      interpret: simulate the kernel, for tests.
      options: the attributes of the operation.

    Returns:
      [b, t, k, g, e] in the operation's `out_dtype`.

    Raises:
      OptionError: `uncovered` has a reason.
    """
    if reason := uncovered(q, k, v, *terms, **options):
        raise OptionError(f"attention on Hopper: {reason}")
    (b, t, heads, g, d), (s, e) = q.shape, (k.shape[1], v.shape[3])
    queries, keys = round_up(t, QUERIES), round_up(s, KEYS)
    masks = [coverage.padded_mask(mask, queries, keys, t, s) for mask in terms]
    if masks:
        blocks = coverage.visible_blocks(masks[0], QUERIES, KEYS)
    else:
        blocks = coverage.all_blocks(queries // QUERIES, keys // KEYS)
    padded = [jnp.pad(q.reshape(b, t, heads * g, d), [(0, 0), (0, queries - t), (0, 0), (0, 0)])]
    padded += [jnp.pad(x, [(0, 0), (0, keys - s), (0, 0), (0, 0)]) for x in (k, v)]
    out = plgpu.kernel(
        functools.partial(_attend, scale=options["scale"], softcap=options["softcap"], group=g, s=s),
        out_type=jax.ShapeDtypeStruct((b, queries, heads * g, e), options["out_dtype"]),
        grid=(heads * g, queries // QUERIES, b),
        grid_names=("head", "tile", "sequence"),
        scratch_types=[
            tiled((QUERIES, d), jnp.bfloat16),
            tiled((STAGES, KEYS, d), jnp.bfloat16),
            tiled((STAGES, KEYS, e), jnp.bfloat16),
            *(plgpu.SMEM((STAGES, QUERIES, KEYS), jnp.int8) for _ in masks),
            tiled((QUERIES, KEYS), jnp.bfloat16),
            tiled((QUERIES, e), options["out_dtype"]),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2 + len(masks), num_barriers=STAGES),
        ],
        interpret=interpret,
        kernel_name="attention",
    )(*blocks, *padded, *masks)
    return out[:, :t].reshape(b, t, heads, g, e)


def _attend(
    first: Any,  # int32 [b | 1, nt]
    stop: Any,  # int32 [b | 1, nt]
    q: Any,  # bfloat16 [b, t, h, d]
    k: Any,  # bfloat16 [b, s, k, d]
    v: Any,  # bfloat16 [b, s, k, e]
    *others: Any,  # mask int8 [b | 1, t, s] if there is one; out [b, t, h, e]; and what follows, in shared memory
    scale: float,
    softcap: float | None,
    group: int,
    s: int,
) -> None:
    masks = others[: (len(others) - 7) // 2]
    # q [QUERIES, d]; k [STAGES, KEYS, d]; v [STAGES, KEYS, e]; masks [STAGES, QUERIES, KEYS]; probs [QUERIES, KEYS]
    out, q_tile, k_tiles, v_tiles, *mask_tiles, probs, result, q_arrived, arrived = others[len(masks) :]
    head, tile, sequence = (jax.lax.axis_index(name) for name in ("head", "tile", "sequence"))
    table = sequence if first.shape[0] > 1 else 0
    mine, begin, end = pl.ds(tile * QUERIES, QUERIES), first[table, tile], stop[table, tile]

    def fetch(block: Any, stage: Any) -> None:
        part, shared = pl.ds(block * KEYS, KEYS), jax.lax.div(head, group)
        plgpu.copy_gmem_to_smem(k.at[sequence, part, shared], k_tiles.at[stage], arrived.at[stage])
        plgpu.copy_gmem_to_smem(v.at[sequence, part, shared], v_tiles.at[stage], arrived.at[stage])
        for mask, target in zip(masks, mask_tiles, strict=True):
            plgpu.copy_gmem_to_smem(mask.at[table, mine, part], target.at[stage], arrived.at[stage])

    def look(block: Any, rows: Rows) -> Rows:
        stage = jax.lax.rem(block - begin, STAGES)
        plgpu.barrier_wait(arrived.at[stage])
        scores = cap_scores(product(q_tile, k_tiles.at[stage].T, KEYS), scale, softcap)
        keep = None
        if masks:
            keep = mask_tiles[0][stage].astype(jnp.int32) != 0
        elif s % KEYS:
            keep = block * KEYS + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < s

        def weigh(weights: jax.Array) -> jax.Array:
            probs[...] = weights.astype(jnp.bfloat16)
            plgpu.commit_smem()
            return product(probs, v_tiles.at[stage], v_tiles.shape[2])

        rows = absorb(rows, scores, keep, weigh)
        plgpu.commit_smem()  # all warps are done with this stage

        @pl.when(block + STAGES < end)
        def _refill() -> None:
            fetch(block + STAGES, stage)

        return rows

    plgpu.copy_gmem_to_smem(q.at[sequence, mine, head], q_tile, q_arrived)
    for stage in range(STAGES):
        pl.when(begin + stage < end)(functools.partial(fetch, begin + stage, stage))
    plgpu.barrier_wait(q_arrived)
    numbers = (jnp.full(QUERIES, LOWEST, jnp.float32), jnp.zeros(QUERIES, jnp.float32))
    rows = Rows(*numbers, jnp.zeros(result.shape, jnp.float32))
    result[...] = finish(jax.lax.fori_loop(begin, end, look, rows)).astype(out.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[sequence, mine, head])
    plgpu.wait_smem_to_gmem(0)
