"""The CPU kernel of cached_attention on rings, pages and 8-bit codes, against NumPy in float64 written out."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.test_cached_attention_cpu import ATTRIBUTES, DTYPES, ISAS
from tests.passes.decoding import difference
from xlathe.errors import OptionError
from xlathe.kernels import native
from xlathe.kernels.cached_attention.cpu import TARGET_F32, TARGET_INT8, cached_attention
from xlathe.ops.cached_attention import cached_attention as operation
from xlathe.ops.write_slots import quantize_heads, write_slots

pytestmark = pytest.mark.skipif(native.library() is None, reason="built without a C++ compiler")

ROWS, SLOTS, K, G, D, E = 3, 200, 2, 3, 24, 40
PAGE, RING, WINDOW = 8, 48, 20
LAYOUTS = ("contiguous", "ring", "paged")
FORMS = list(itertools.product(LAYOUTS, (False, True)))
OUTSIDE = [-1, 10**6, -7]  # entries of a table that are no pages
# Rows and positions: prompts of 20 and 9 tokens, one that is decoded, and padding.
PLACES = [*((0, p) for p in range(130, 150)), (1, 77), *((2, p) for p in range(60, 69)), (ROWS, 3), (1, -1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens over remembered keys and values [ROWS, SLOTS, K, D | E]; those that no token sees are never stored."""

    q: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    window: int | None

    def seen(self, i: int) -> np.ndarray:
        position = self.positions[i]
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return np.arange(first, position + 1 if self.rows[i] < ROWS else first)

    def stored(self) -> list[tuple[int, int]]:
        return sorted({(int(self.rows[i]), int(p)) for i in range(len(self.rows)) for p in self.seen(i)})

    def taken(self, tokens: list[int]) -> "Case":
        return dataclasses.replace(self, q=self.q[tokens], rows=self.rows[tokens], positions=self.positions[tokens])


def random_case(window: int | None = WINDOW) -> Case:
    """Every other token's needle lies among the keys it sees, so that its softmax is peaked."""
    rng = np.random.default_rng(0)
    rows, positions = np.asarray(PLACES, np.int32).T
    q = rng.standard_normal((len(PLACES), K, G, D), np.float32)
    keys, values = (rng.standard_normal((ROWS, SLOTS, K, width), np.float32) for width in (D, E))
    case = Case(q, keys, values, rows, positions, window)
    for i in range(0, len(PLACES) - 2, 2):
        keys[rows[i], rng.choice(case.seen(i))] = 4 * q[i, :, 0]
    return case


def stored(case: Case, layout: str, codes: bool) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """The operands of the kernel, and its options: NaN, or the largest code with a scale of NaN, where nothing is."""
    table, options = None, {"layout": layout, "window": case.window, "scale": 0.3}
    lead = {"contiguous": (ROWS, SLOTS), "ring": (ROWS, RING), "paged": (ROWS * SLOTS // PAGE + 2, PAGE)}[layout]
    if layout == "paged":
        rng = np.random.default_rng(1)
        table = rng.permutation(lead[0])[: ROWS * SLOTS // PAGE].reshape(ROWS, -1).astype(np.int32)
        used = np.zeros(table.shape, bool)
        for row, position in case.stored():
            used[row, position // PAGE] = True
        options["table"] = table = np.where(used, table, rng.choice(OUTSIDE, table.shape)).astype(np.int32)

    def place(row: int, position: int) -> tuple[int, int]:
        if table is not None:
            return table[row, position // PAGE], position % PAGE
        return row, position % lead[1]

    def arranged(filled: np.ndarray, dead: float) -> np.ndarray:
        kept = np.full((*lead, *filled.shape[2:]), dead, filled.dtype)
        for row, position in case.stored():
            kept[place(row, position)] = filled[row, position]
        return kept

    if not codes:
        caches = [arranged(x, np.nan) for x in (case.keys, case.values)]
    else:
        pairs = [quantized(x) for x in (case.keys, case.values)]
        caches = [arranged(x, 127) for x, _ in pairs]
        options["scales"] = tuple(arranged(scale, np.nan) for _, scale in pairs)
    return (case.q, *caches, case.rows, case.positions), options


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = quantize_heads(jnp.asarray(x.reshape(-1, *x.shape[2:])))
    return np.asarray(codes).reshape(x.shape), np.asarray(scale).reshape(x.shape[:-1])


def written_out(
    case: Case, codes: bool, softcap: float | None = None, mask: Any = None, bias: Any = None
) -> np.ndarray:
    keys, values = case.keys.astype(np.float64), case.values.astype(np.float64)
    if codes:
        pairs = [quantized(x) for x in (case.keys, case.values)]
        keys, values = (x.astype(np.float64) * scale[..., None] for x, scale in pairs)
    out = np.zeros((*case.q.shape[:3], E))
    for i, h, g in np.ndindex(out.shape[:3]):
        seen = case.seen(i)
        if mask is not None:
            seen = seen[mask[h % mask.shape[0], g % mask.shape[1], i, seen]]
        if not len(seen):
            continue
        scores = keys[case.rows[i], seen, h] @ case.q[i, h, g].astype(np.float64) * 0.3
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias[h % bias.shape[0], g % bias.shape[1], i, seen]
        weights = np.exp(scores - scores.max())
        out[i, h, g] = weights / weights.sum() @ values[case.rows[i], seen, h]
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("layout", "codes"), FORMS)
def test_windows(layout: str, codes: bool, softcap: float | None, isa: str) -> None:
    case = random_case()
    args, options = stored(case, layout, codes)
    found = cached_attention(*args, **options, softcap=softcap, isa=isa)
    assert difference(found, written_out(case, codes, softcap)) <= 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads", [(1, 1), (K, G), (K, 1)])
@pytest.mark.parametrize(("layout", "codes"), [form for form in FORMS if form[0] != "ring"])
def test_everything_before_with_mask_and_bias(layout: str, codes: bool, heads: tuple[int, int], isa: str) -> None:
    case, rng = random_case(None), np.random.default_rng(2)
    args, options = stored(case, layout, codes)
    shape = (*heads, len(PLACES), SLOTS)
    bias, mask = rng.standard_normal(shape, np.float32), rng.random(shape) < 0.7
    mask |= np.arange(SLOTS) == case.positions[:, None]
    found = cached_attention(*args, **options, mask=mask, bias=bias, isa=isa)
    assert difference(found, written_out(case, codes, mask=mask, bias=bias)) <= 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 16, 23, D])
@pytest.mark.parametrize(("layout", "codes"), FORMS)
def test_values_that_are_part_of_the_keys(layout: str, codes: bool, width: int, isa: str) -> None:
    """As in latent attention: the same bits as from a copy, whose values are those features alone."""
    case = random_case()
    (q, keys, _, *places), options = stored(case, layout, codes)
    if codes:
        options["scales"] = (options["scales"][0],) * 2
    found = cached_attention(q, keys, keys, *places, **options, shared=width, isa=isa)
    expected = cached_attention(q, keys, keys[..., :width], *places, **options, isa=isa)
    assert found.shape == (len(PLACES), K, G, width)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codes", [False, True])
def test_layouts_and_company_change_no_bit(codes: bool, isa: str) -> None:
    """A token alone in each layout, and in the reverse of the list, as in a tile with those beside it."""
    case = random_case()
    args, options = stored(case, "contiguous", codes)
    expected = np.asarray(cached_attention(*args, **options, isa=isa))
    backwards = list(range(len(PLACES)))[::-1]
    for layout in LAYOUTS:
        args, options = stored(case, layout, codes)
        np.testing.assert_array_equal(cached_attention(*args, **options, isa=isa), expected)
        token = [args[0][backwards], *args[1:3], args[3][backwards], args[4][backwards]]
        np.testing.assert_array_equal(cached_attention(*token, **options, isa=isa), expected[backwards])
    for i in range(0, len(PLACES), 3):
        args, options = stored(case.taken([i]), layout, codes)
        np.testing.assert_array_equal(cached_attention(*args, **options, isa=isa)[0], expected[i])


@pytest.mark.parametrize(("layout", "codes"), FORMS)
def test_later_tokens_of_a_prompt_leak_nothing(layout: str, codes: bool) -> None:
    """NaN at position 140 is seen by those from 140 on alone, although one pass serves them all."""
    args, options = stored(random_case(), layout, codes)
    expected = cached_attention(*args, **options)
    where = {"contiguous": (0, 140), "ring": (0, 140 % RING), "paged": None}[layout]
    if where is None:
        where = (options["table"][0, 140 // PAGE], 140 % PAGE)
    for broken in options["scales"] if codes else args[1:3]:
        broken[where] = np.nan
    found = np.asarray(cached_attention(*args, **options))
    np.testing.assert_array_equal(found[:10], expected[:10])
    assert np.isnan(found[10:20]).all()
    np.testing.assert_array_equal(found[20:], expected[20:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codes", [False, True])
def test_pages_outside_the_pool_are_not_seen(codes: bool, isa: str) -> None:
    """Also between pages that are; whoever sees none gets zeros."""
    case = random_case(None)
    args, options = stored(case, "paged", codes)
    options["table"][0, [0, 3, 4, 16]] = [-1, 10**6, -7, -1]
    options["table"][1] = -1
    held = [i for i, row in enumerate(case.rows) if row in (0, 2)]
    found = np.asarray(cached_attention(*args, **options, isa=isa))
    assert not found[[i for i in range(len(PLACES)) if i not in held]].any()
    some = case.taken(held)
    more = [*options.get("scales", ()), options["table"]]
    expected = operation.body(
        some.q, *map(jnp.asarray, args[1:3]), jnp.asarray(some.rows), jnp.asarray(some.positions),
        *map(jnp.asarray, more), scale=0.3, softcap=None, window=None, masked=False, biased=False, layout="paged",
        quantized=codes, **DTYPES,
    )  # fmt: skip
    assert difference(found[held], expected) <= 1e-5


@pytest.mark.parametrize(("layout", "codes"), FORMS)
def test_rejected_tokens_are_written_over(layout: str, codes: bool) -> None:
    """A text read by one token a call, and by calls that draft seven more in vain: the same bits."""
    rng = np.random.default_rng(3)
    text = [rng.standard_normal((60, K, width), np.float32) for width in (D, E)]
    wrong = [rng.standard_normal((8, K, width), np.float32) for width in (D, E)]
    blank, options = stored(random_case().taken([len(PLACES) - 1]), layout, codes)
    if layout == "paged":
        options["table"] = np.random.default_rng(4).permutation(len(blank[1]))[:75].reshape(3, 25).astype(np.int32)
    table, q = [jnp.asarray(options["table"])] if layout == "paged" else [], jnp.ones((1, K, G, D))

    @jax.jit
    def write(caches: list[Any], new: list[np.ndarray], start: int) -> list[Any]:
        at = start + jnp.arange(len(new[0]), dtype=jnp.int32)
        parts = [part for x in new for part in (quantize_heads(jnp.asarray(x)) if codes else (x,))]
        return [write_slots.body(c, p, at * 0, at, *table, layout=layout) for c, p in zip(caches, parts, strict=True)]

    def read(caches: list[Any], position: int) -> jax.Array:
        at, scales = jnp.full(1, position, jnp.int32), {"scales": (caches[1], caches[3])} if codes else {}
        return cached_attention(q, *caches[:: 2 if codes else 1], at * 0, at, **{**options, **scales})

    caches = [x for pair in zip(blank[1:3], options["scales"], strict=True) for x in pair] if codes else blank[1:3]
    plain, drafted = [jnp.asarray(c) for c in caches], [jnp.asarray(c) for c in caches]
    for position in range(60):
        one = [x[position : position + 1] for x in text]
        plain = write(plain, one, position)
        drafted = write(drafted, [np.concatenate([a, b[1:]]) for a, b in zip(one, wrong, strict=True)], position)
        expected = np.asarray(read(plain, position))
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(read(drafted, position), expected)


def good(layout: str = "contiguous", codes: bool = False) -> tuple[list[np.ndarray], dict[str, Any]]:
    args, options = stored(random_case(), layout, codes)
    return list(args), options


@pytest.mark.parametrize(
    ("layout", "codes", "change", "found"),
    [
        ("ring", False, {"shared": E + 1}, "expected shared up to 40 features; found 41"),
        ("ring", False, {"layout": "circle"}, "found circle with none of them"),
        ("paged", False, {"table": None}, "found paged with none of them"),
        ("ring", False, {"table": np.zeros((3, 25), np.int32)}, "found ring with table"),
        ("ring", False, {"mask": np.ones((1, 1, 32, 48), bool)}, "found ring with mask"),
        ("paged", False, {"table": np.zeros((3, 25), np.int64)}, r"table int64\[3, 25\]"),
        ("paged", False, {"bias": np.ones((1, 1, 32, 199), np.float32)}, r"bias float32\[1, 1, 32, 199\]"),
        ("paged", True, {"scales": None}, r"expected .*keys float32 .*found .*keys int8\[77, 8, 2, 24\]"),
        ("ring", True, {"scales": (np.ones((3, 48, 2), np.float32),) * 2, "layout": "contiguous"}, None),
        ("ring", True, {"scales": (np.ones((3, 48, 1), np.float32),) * 2}, r"key scales float32\[3, 48, 1\]"),
        ("ring", False, {"scales": (np.ones((3, 48, 2), np.float32),) * 2}, r"found .*keys float32"),
    ],
)
def test_refused_options(layout: str, codes: bool, change: dict[str, Any], found: str | None) -> None:
    args, options = good(layout, codes)
    if found is None:
        assert cached_attention(*args, **{**options, **change}).shape == (32, K, G, E)
        return
    with pytest.raises(OptionError, match=found):
        cached_attention(*args, **{**options, **change})


TERM = np.ones((1, 1, 32, 200), np.float32)
TABLE = np.zeros((3, 25), np.int32)
SCALES = [np.ones((3, 200, 2), np.float32)] * 2


@pytest.mark.parametrize(
    ("layout", "codes", "more", "attributes", "message"),
    [
        ("contiguous", False, [], {"layout": "circle"}, "found circle"),
        ("ring", False, [TERM], {"biased": True}, "or ring without mask and bias; found ring"),
        ("paged", False, [], {}, "expected terms"),
        ("paged", False, [TABLE.astype(np.int64).view(np.int32)[0]], {}, "expected terms"),
        ("paged", False, [TABLE.astype(np.float32)], {}, "expected terms"),
        ("paged", False, [TERM[..., :192], TABLE], {"biased": True}, "expected terms"),
        ("contiguous", False, [TABLE], {}, "expected terms"),
        ("contiguous", True, [], {}, "expected terms"),
        ("contiguous", True, SCALES[:1], {}, "expected terms"),
        ("contiguous", True, [SCALES[0], SCALES[1][:, :, :1]], {}, "expected terms"),
        ("ring", True, SCALES, {}, "expected terms"),
    ],
)
def test_native_code_refuses_by_itself(
    layout: str, codes: bool, more: list[np.ndarray], attributes: dict[str, Any], message: str
) -> None:
    native.register()
    args, _ = good(layout, codes)
    call: Callable[..., Any] = jax.ffi.ffi_call(
        TARGET_INT8 if codes else TARGET_F32, jax.ShapeDtypeStruct((32, K, G, E), jnp.float32)
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(*args, *more, **{**ATTRIBUTES, "layout": layout, **attributes})
