"""The contract of a cache's layout: any chunking and any mixture of rows equals the full forward, as before."""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xlathe
from tests.passes.decoding import CHUNK, decode, difference, feed, fused, in_one_batch, stepped
from tests.variants import DECODERS, forward
from xlathe import jaxpr as ir
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.kernels import native
from xlathe.ops.attention import attention
from xlathe.ops.cached_attention import cached_attention
from xlathe.ops.write_slots import quantize_heads
from xlathe.parser import parse
from xlathe.passes import PASSES
from xlathe.passes.cache_layout import CacheLayout
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.specialize import Specialize
from xlathe.pipeline import Pipeline
from xlathe.printer import to_text
from xlathe.program import Program
from xlathe.step import TABLE, State, cache_sizes, empty_state

VARIANTS = {variant.name: variant for variant in DECODERS}
LENGTHS, ROWS, SLOTS, COUNT = (45, 31, 9), [2, 0, 3], 48, 5
RING = CacheLayout("ring", slack=CHUNK)
PAGED = CacheLayout("paged", page=8)
INT8 = CacheLayout(dtype="int8")
POOL = COUNT * SLOTS // PAGED.page + 3  # pages: three more than the rows need belong to nobody
KERNELS = [
    pytest.param(False, id="reference"),
    pytest.param(True, id="kernels", marks=pytest.mark.skipif(not native.library(), reason="built without C++")),
]
HLO_DTYPES = {"float32": "f32", "int8": "s8"}
CLEAR = 1e-4  # codes: float32 errors of two computations of a key move it by a quarter of that


def in_8_bits(layout: CacheLayout) -> CacheLayout:
    return dataclasses.replace(layout, dtype="int8")


def derived(name: str) -> Graph:
    return stepped(VARIANTS[name])


@functools.cache
def laid_out(name: str, layout: CacheLayout, kernels: bool = False) -> Graph:
    return lowered(laid_out(name, layout)) if kernels else layout(derived(name))


def lowered(graph: Graph) -> Graph:
    """With the CPU kernels, for the sizes that `unused` states have; every attention gets one."""
    sizes = {"r": ("rows", COUNT), "s": ("slots", SLOTS), "p": ("pages", POOL), "c": ("row_pages", SLOTS // PAGED.page)}
    cache = dict(sizes[name] for name in cache_sizes(graph, COUNT, SLOTS))
    result = LowerKernels("cpu")(Specialize(tokens=CHUNK, selected=CHUNK, **cache)(graph))
    assert not [note for note in result.history[-1].notes if "cached_attention" in note]
    return result


def texts(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VARIANTS[name].vocab, n) for n in LENGTHS]


def mixed_schedule() -> list[dict[int, int]]:
    """Chunks of 1 to 8 tokens of one to three texts, until all are read."""
    rng, left, calls = np.random.default_rng(2), list(LENGTHS), []
    while any(left):
        call: dict[int, int] = {}
        for text in rng.permutation(3)[: rng.integers(1, 4)].tolist():
            count = min(left[text], int(rng.integers(1, CHUNK + 1)), CHUNK - sum(call.values()))
            call |= {text: count} if count else {}
            left[text] -= count
        calls += [call] if call else []
    return calls


def unused(graph: Graph) -> State:
    """States full of what must never be read: NaN, the largest codes, pages in no order; row 4 has no pages."""
    pages = SLOTS // PAGED.page
    sizes = {"r": COUNT, "s": SLOTS, "c": pages, "p": POOL}
    states = []
    for name in graph.names("state"):
        aval = graph.aval(name)
        shape = ir.substitute(tuple(aval.shape), sizes)
        states.append(jnp.full(shape, np.nan if jnp.issubdtype(aval.dtype, jnp.floating) else 127, aval.dtype))
    if TABLE in graph.names("state"):
        table = np.random.default_rng(3).permutation(sizes["p"])[: COUNT * pages].reshape(COUNT, pages)
        table[4] = [-1, sizes["p"], 10**6, -7, -1, -1]
        states[-1] = jnp.asarray(table, jnp.int32)
    return tuple(states)


@functools.cache
def rounded_forward(name: str) -> Any:
    """The forward with the keys and values of every attention rounded to 8 bits a token and head, written out.

    Tokens [b, t] -> logits, and how far the numbers of each token lie from where rounding changes, in codes [b, t].
    """
    graph = fused(VARIANTS[name])
    arrays = graph.arrays

    def run(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        margins: list[jax.Array] = []

        def rounded(x: jax.Array) -> jax.Array:  # [b, s, k, d]
            step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
            margins.append(jnp.abs(x / step - jnp.floor(x / step) - 0.5).min(axis=(2, 3)))
            return jnp.round(x / step) * step

        def rule(eqn: ir.JaxprEqn, operands: list[Any]) -> list[Any] | None:
            if not ir.is_op(eqn, "attention"):
                return None
            q, keys, values, *terms = operands
            return [attention(q, rounded(keys), rounded(values), *terms, **ir.attributes(eqn))]

        sizes = {"b": tokens.shape[0], "t": tokens.shape[1]}
        operands = graph.bind_names({**arrays, "tokens": tokens})
        (logits,) = ir.evaluate_at(graph.jaxpr, operands, sizes, rule)
        return logits, jnp.stack(margins).min(0)

    return jax.jit(run)


@functools.cache
def clear_texts(name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Texts of which no key or value lies between two codes, where float32's own error decides, and their logits."""
    for seed in range(1000):
        tokens = np.random.default_rng(seed).integers(0, VARIANTS[name].vocab, (len(LENGTHS), max(LENGTHS)))
        logits, margins = map(np.asarray, rounded_forward(name)(tokens))
        if min(margin[:n].min() for margin, n in zip(margins, LENGTHS, strict=True)) > CLEAR:
            return [x[:n] for x, n in zip(tokens, LENGTHS, strict=True)], list(logits)
    raise AssertionError("no such texts")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("window_7", RING),
        ("window_16", RING),
        ("window_and_global", RING),
        ("window_7", PAGED),
        ("latent_and_rotary_key", PAGED),
        ("repeat_gqa", PAGED),
        ("alibi_keys", PAGED),
        ("window_7", CacheLayout()),
    ],
    ids=str,
)
def test_any_mixture_of_rows_equals_the_forward(name: str, layout: CacheLayout, kernels: bool) -> None:
    graph = laid_out(name, layout, kernels)
    found = decode(graph, texts(name), mixed_schedule(), ROWS, SLOTS, unused(graph))
    for logits, expected in zip(found, forward(VARIANTS[name])(in_one_batch(texts(name))), strict=True):
        assert difference(logits, expected[: len(logits)]) <= 1e-5


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("window_7", in_8_bits(RING)),
        ("window_and_global", in_8_bits(RING)),
        ("alibi_keys", in_8_bits(PAGED)),
        ("repeat_gqa", INT8),
    ],
    ids=str,
)
def test_8_bits_are_those_of_a_forward_with_rounded_keys_and_values(
    name: str, layout: CacheLayout, kernels: bool
) -> None:
    graph = laid_out(name, layout, kernels)
    clear, expected = clear_texts(name)
    found = decode(graph, clear, mixed_schedule(), ROWS, SLOTS, unused(graph))
    unrounded = forward(VARIANTS[name])(in_one_batch(clear))
    for text, logits, wanted, exact in zip(clear, found, expected, unrounded, strict=True):
        assert difference(logits, wanted[: len(text)]) <= 1e-5
        assert 1e-3 < difference(logits, exact[: len(text)]) < 2e-2  # what rounding costs


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("name", "layout"),
    [("window_7", RING), ("window_7", in_8_bits(RING)), ("window_7", PAGED), ("repeat_gqa", in_8_bits(PAGED))],
    ids=str,
)
def test_rejected_tokens_are_forgotten(name: str, layout: CacheLayout, kernels: bool) -> None:
    """Each call reads one token that stands and seven that do not; the next goes on after the one that stands."""
    graph, vocab = laid_out(name, layout, kernels), VARIANTS[name].vocab
    (text, *_), (expected, *_) = clear_texts(name)
    if layout.dtype is None:
        expected = forward(VARIANTS[name])(text[None])[0]
    rng, state, logits = np.random.default_rng(4), unused(graph), []
    for position, token in enumerate(text[:40].tolist()):
        wrong = [(int(rng.integers(vocab)), position + 1 + i, 1) for i in range(CHUNK - 1)]
        output, state = feed(graph, [(token, position, 1), *wrong], COUNT, state)
        logits.append(output[0])
    assert difference(np.stack(logits), expected[:40]) <= 1e-5


@pytest.mark.parametrize("layout", [RING, in_8_bits(PAGED), CacheLayout()], ids=str)
def test_what_lies_outside_the_cache_is_dropped(layout: CacheLayout) -> None:
    """Rows that do not exist, pages that are not in use, and, but in a ring, positions past the last slot."""
    graph = laid_out("window_7", layout)
    state = unused(graph)
    pieces = [(1, 3, COUNT), (2, 0, COUNT + 7)]
    pieces += [(3, 5, 4), (3, 16, 4), (3, 25, 4)] if layout.layout == "paged" else []
    pieces += [(4, SLOTS, 1)] if layout.layout != "ring" else []
    _, after = feed(graph, pieces, COUNT, state)
    for name, old, new in zip(graph.names("state"), state, after, strict=True):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old), err_msg=name)


def test_codes_in_shuffled_pages_as_numpy_computes_them() -> None:
    """Attention of each query over keys and values looked up page by page, which are codes times scales."""
    rng = np.random.default_rng(5)
    n, heads, groups, d, e, page, rows = 6, 2, 3, 8, 4, 4, 3
    table = rng.permutation(14)[: rows * 4].reshape(rows, 4).astype(np.int32)
    table[1, 2:] = [-1, 99]
    q, bias = rng.normal(size=(n, heads, groups, d)), rng.normal(size=(heads, 1, n, 16))
    keys, values = (rng.integers(-127, 128, (14, page, heads, width)).astype(np.int8) for width in (d, e))
    scales = rng.uniform(0.002, 0.02, (2, 14, page, heads))
    scales[:, 13] = np.nan
    table[table == 13] = 100
    row, position = np.array([0, 2, 1, 1, 0, 2], np.int32), np.array([3, 11, 7, 0, 9, 4], np.int32)
    single = {f"{stage}_dtype": "float32" for stage in ("scores", "softmax", "probs", "out")}
    found = cached_attention(
        q.astype(np.float32), keys, values, row, position, bias.astype(np.float32), *scales.astype(np.float32), table,
        scale=0.4, softcap=None, window=6, masked=False, biased=True, layout="paged", quantized=True, **single,
    )  # fmt: skip
    expected = np.zeros((n, heads, groups, e))
    for i, (r, p) in enumerate(zip(row, position, strict=True)):
        seen = [j for j in range(max(0, p - 5), p + 1) if 0 <= table[r, j // page] < 14]
        places = [(table[r, j // page], j % page) for j in seen]
        for h in range(heads):
            own = np.stack([keys[place][h] * scales[0][place][h] for place in places])
            scores = q[i, h] @ own.T * 0.4 + bias[h, 0, i, seen]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected[i, h] = weights @ np.stack([values[place][h] * scales[1][place][h] for place in places])
    assert difference(found, jnp.asarray(expected)) <= 1e-5


def test_codes_are_the_nearest_of_255() -> None:
    values = np.random.default_rng(6).normal(size=(5, 2, 16)).astype(np.float32)
    values[3, 1] = 0
    codes, scale = map(np.asarray, quantize_heads(jnp.asarray(values)))
    largest = np.abs(values).max(-1)
    assert (codes.dtype, scale.shape) == (np.int8, (5, 2))
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    assert (np.abs(codes).max(-1) == np.where(largest > 0, 127, 0)).all()
    assert (np.abs(codes * scale[..., None] - values) <= 0.5001 * scale[..., None]).all()


def test_the_record_says_what_a_token_and_a_row_take() -> None:
    """2 layers of keys and values, 2 heads of 8, float32 or a byte and a scale; page tables of 4 bytes an entry."""

    def notes(layout: CacheLayout, name: str = "repeat_gqa") -> tuple[str, ...]:
        return laid_out(name, layout).history[-1].notes

    assert notes(CacheLayout()) == ("256 bytes a token, 16384 bytes a row of 64 tokens",)
    assert notes(INT8) == ("96 bytes a token, 6144 bytes a row of 64 tokens",)
    assert notes(PAGED) == ("256.5 bytes a token, 16416 bytes a row of 64 tokens",)
    assert notes(RING, "window_7") == ("0 bytes a token, 7680 bytes a row of 64 tokens",)  # 15 slots of 512


def test_only_exact_windows_are_rings() -> None:
    record = laid_out("window_and_global", RING).history[-1]
    assert record.hits == {"ring": 2, "contiguous": 2}
    assert record.misses == ("1 attentions stay contiguous: all earlier tokens are seen",)
    assert laid_out("alibi_keys", RING).history[-1].misses == (
        "2 attentions stay contiguous: a mask or bias reads every position",
    )
    assert laid_out("window_16", CacheLayout("ring", slack=48)).history[-1].misses == (
        "2 attentions stay contiguous: a window of 16 and a slack of 48 are no less than max_len=64",
    )


def test_an_unchanged_layout_is_the_same_program() -> None:
    before, after = derived("repeat_gqa"), laid_out("repeat_gqa", CacheLayout())
    live = before.replace(jaxpr=ir.drop_dead(before.jaxpr, keep=lambda _: True)[0])
    expected, found = ([x for x in to_text(g).splitlines() if "symbolic_shape(" not in x] for g in (live, after))
    assert found == expected


@pytest.mark.parametrize("layout", [in_8_bits(PAGED), RING], ids=str)
def test_text_of_pass_and_graph_round_trips(layout: CacheLayout) -> None:
    assert Pipeline.parse(str(layout), PASSES).passes == (layout,)
    graph = laid_out("window_and_global", layout)
    jaxpr, inputs = parse(to_text(graph))
    assert to_text(graph.replace(jaxpr=jaxpr, inputs=inputs)) == to_text(graph)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "sparse"}, r"layout must be one of \('contiguous', 'ring', 'paged'\), got 'sparse'"),
        ({"dtype": "int4"}, "dtype must be 'int8' or None, got 'int4'"),
        ({"page": 0}, "page must be an integer of at least 1, got 0"),
        ({"slack": 2.5}, "slack must be an integer of at least 1, got 2.5"),
    ],
)
def test_options_are_checked(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        CacheLayout(**options)


def test_graphs_are_checked() -> None:
    with pytest.raises(OptionError, match="page=24 does not divide max_len=64"):
        CacheLayout("paged", page=24)(derived("window_7"))
    with pytest.raises(PassError, match="was laid out before"):
        PAGED(laid_out("window_7", RING))
    with pytest.raises(PassError, match="was laid out before"):
        PAGED(laid_out("repeat_gqa", INT8))
    fixed = Specialize(tokens=4, selected=4, rows=1, slots=32)(derived("window_7"))
    with pytest.raises(PassError, match="run CacheLayout before Specialize"):
        PAGED(fixed)
    with pytest.raises(PassError, match="run KVCache"):
        PAGED(fused(VARIANTS["window_7"]))


def test_what_a_layout_has_no_room_for_is_not_compiled() -> None:
    ring, paged = laid_out("window_7", RING), laid_out("window_7", PAGED)
    with pytest.raises(OptionError, match=r"up to 16 tokens of a row .* have room for 8"):
        xlathe.compile(ring, chunks=(4, 16))
    with pytest.raises(OptionError, match=r"up to 10 tokens of a row \(chunks=\(8,\), gamma=9\)"):
        xlathe.compile(ring, chunks=(8,), draft="ngram", gamma=9)
    with pytest.raises(OptionError, match="max_len=44 is no multiple of the 8 tokens"):
        xlathe.compile(paged, max_len=44)


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_layouts_without_a_kernel_are_told(target: str) -> None:
    fixed = Specialize(tokens=4, selected=4, rows=2)(laid_out("window_7", RING))
    record = LowerKernels(target)(fixed).history[-1]
    reason = "expected a contiguous or a paged cache; found a ring"
    assert record.notes == (f"2 by the reference body, cached_attention: {reason}",)


def greedy(graph: Graph, prompt: list[int], count: int) -> tuple[int, ...]:
    """The likeliest tokens after a prompt, one call a token."""
    state, text = empty_state(graph, 2, SLOTS), list(prompt)
    for position in range(len(prompt) + count - 1):
        logits, state = feed(graph, [(text[position], position, 1)], 2, state)
        text += [int(logits[0].argmax())] if position + 1 == len(text) else []
    return tuple(text[len(prompt) :])


@pytest.fixture(scope="module")
def programs() -> dict[CacheLayout, Program]:
    layouts = (CacheLayout(), RING, PAGED, in_8_bits(PAGED))
    sizes: dict[str, Any] = {"max_len": SLOTS, "max_batch": 3, "chunks": (CHUNK,), "unit": 8}
    return {layout: xlathe.compile(laid_out("window_7", layout), **sizes) for layout in layouts}


def test_programs_of_every_layout_answer_alike(programs: dict[CacheLayout, Program]) -> None:
    """Greedy and sampled, in a batch: rings and pages give the very tokens of a contiguous cache."""
    prompts = [text[:n].tolist() for text, n in zip(texts("window_7"), (13, 20, 2), strict=True)]
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        plain, ring, paged = (
            [c.tokens for c in programs[layout].generate(prompts, 25, **options)]
            for layout in (CacheLayout(), RING, PAGED)
        )
        assert plain == ring == paged


def test_decoding_copies_no_cache(programs: dict[CacheLayout, Program]) -> None:
    """Each token is written where the cache lies: nothing else, fused or not, makes an array of a cache's shape."""
    writes = {"dynamic-update-slice", "scatter"}
    in_place = {"parameter", "get-tuple-element", "bitcast", "fusion"} | writes
    for layout, program in programs.items():
        for rows, avals in program.state_avals.items():
            text = program.calls[f"decode_r{rows}"].as_text()
            assert "while(" in text and "callback" not in text
            for aval in (aval for name, aval in avals.items() if name != TABLE):
                shape = f"{HLO_DTYPES[aval.dtype.name]}[{','.join(map(str, aval.shape))}]"
                makers = set(re.findall(rf"= {re.escape(shape)}\S* ([a-z-]+)\(", text))
                assert makers & writes
                assert makers <= in_place, (str(layout), rows, shape)


def test_pages_of_codes_compiled_saved_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    graph = laid_out("repeat_gqa", in_8_bits(PAGED))
    prompt = texts("repeat_gqa")[0][:13].tolist()
    program = xlathe.compile(graph, max_len=SLOTS, chunks=(8,), unit=8)
    (found,) = program.generate([prompt], max_tokens=20)
    assert found.tokens == greedy(graph, prompt, 20)
    program.save(tmp_path / "bundle")
    (again,) = xlathe.load(tmp_path / "bundle").generate([prompt], max_tokens=20)
    assert again.tokens == found.tokens


def test_a_ring_rolls_back_what_was_drafted() -> None:
    prompt = texts("window_7")[0][:11].tolist()
    program = xlathe.compile(
        laid_out("window_7", RING), max_len=SLOTS, chunks=(8,), unit=8, draft="ngram", gamma=CHUNK - 1
    )
    (row,) = program.generate([prompt], max_tokens=30)
    assert row.tokens == greedy(derived("window_7"), prompt, 30)
    assert row.stats.acceptance and row.stats.acceptance[0] < 1  # some drafts fell
