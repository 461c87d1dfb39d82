"""Ranks over all tensors of a model, beside NumPy on the concatenated vector."""

from typing import Any

import numpy as np
import pytest
import yaml

from tests.passes.merge.test_merge import arrays, merged, recipe_of
from xlathe.errors import OptionError
from xlathe.passes.merge import ranks, scope
from xlathe.passes.merge.masks import by_size, marks
from xlathe.passes.merge.methods import METHODS
from xlathe.passes.merge.ranks import find_band, find_whole_band

RNG = np.random.default_rng(0)
ARRAYS = [RNG.normal(size=shape).astype(np.float32) for shape in [(40, 50), (3,), (7, 2, 100), ()]]
EXTREME = [np.array([0, -0.0, 1e-45, -3e38, 5.0, -5.0], np.float32), np.array([np.inf], np.float32)]


@pytest.mark.parametrize("values", [ARRAYS, [np.round(a) for a in ARRAYS], EXTREME], ids=["many", "few", "extreme"])
@pytest.mark.parametrize("top", [0, 2])
def test_what_a_band_keeps_is_that_of_a_stable_sort(
    values: list[np.ndarray], top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected wherever the arrays are cut; of a whole model's, all that are equal to the ends, in any order."""
    monkeypatch.setattr(ranks, "CHUNK", 64)
    whole = np.abs(np.concatenate([v.reshape(-1) for v in values]))
    order = np.argsort(-whole, kind="stable")
    for count in sorted({1, len(whole) // 3, len(whole) - top}):
        band, start, found = find_band(lambda: iter(values), top, count), 0, []
        for array in values:
            found.append(np.asarray(marks(array, band, start)).reshape(-1))
            start += array.size
        expected = np.zeros(len(whole), bool)
        expected[order[top : top + count]] = True
        np.testing.assert_array_equal(np.concatenate(found), expected)
        least, most = whole[order[[top + count - 1, top]]]
        turned = find_whole_band(lambda: iter(values[::-1]), top, count)
        found = [np.asarray(marks(array, turned)).reshape(-1) for array in values]
        np.testing.assert_array_equal(np.concatenate(found), (whole >= least) & (whole <= most))


def expected_change(model: str, density: float, gamma: float) -> dict[str, np.ndarray]:
    """A model's changes without those that ranks over all of them leave out."""
    base, given = arrays("base"), arrays(model)
    changes = {name: given[name] - base[name] for name in base}
    whole = np.sort(np.abs(np.concatenate([change.reshape(-1) for change in changes.values()])))[::-1]
    top, count = int(gamma * len(whole)), int(density * len(whole))
    low, high = whole[top + count - 1], whole[top]
    return {name: np.where((np.abs(c) >= low) & (np.abs(c) <= high), c, 0) for name, c in changes.items()}


@pytest.mark.parametrize(("method", "gamma"), [("ties", 0.0), ("breadcrumbs", 0.1), ("breadcrumbs_ties", 0.1)])
def test_ranks_of_whole_models(method: str, gamma: float) -> None:
    given: dict[str, Any] = {"density": 0.3, "scope": "model"} | ({"gamma": gamma} if gamma else {})
    text = recipe_of(method, ["a", "b"]) | {"parameters": given}
    found, by_tensor = merged(yaml.safe_dump(text)), merged(yaml.safe_dump(text | {"parameters": {"density": 0.3}}))
    base, kept = arrays("base"), [expected_change(model, 0.3, gamma) for model in ("a", "b")]
    differing = False
    for name, array in found.items():
        a, b = (0.5 * change[name] for change in kept)
        if method == "breadcrumbs":
            total = a + b
        else:
            sign = np.where(a + b < 0, -1, 1)
            agree = [a * sign > 0, b * sign > 0]
            total = np.where(agree[0], a, 0) + np.where(agree[1], b, 0)
            if method == "ties":
                total = total / np.maximum(0.5 * agree[0] + 0.5 * agree[1], 0.5)
        np.testing.assert_allclose(array, base[name] + total, atol=1e-6, err_msg=name)
        differing |= not np.array_equal(array, by_tensor[name])
    assert differing


ROW_WISE = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
OPTIONS = [
    *((method, {}) for method in METHODS),
    *(("nuslerp", ROW_WISE | {"nuslerp_row_wise": rows}) for rows in (True, False)),
    ("model_stock", {"filter_wise": True}),
    *((method, {"rescale": "keep_prob"}) for method in ("dare_ties", "della")),
]


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_blocks_of_a_tensor_are_merged_as_the_whole(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: blocks of the tensors [11, 4] and [6, 4]. Expected: to the last bits what two rows at a time give."""
    text = recipe_of(method, ["a", "b", "c"][: min(METHODS[method].count[1], 3)])
    known = METHODS[method].each.keys() | METHODS[method].shared.keys()
    given = {"density": 0.4, "gamma": 0.1, "rescale": "l1", "select_topk": 0.5} | options
    text["parameters"] |= {name: value for name, value in given.items() if name in known}
    whole = merged(yaml.safe_dump(text))
    monkeypatch.setattr(scope, "BLOCK", 8)
    for name, array in merged(yaml.safe_dump(text)).items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("rescale", ["none", "keep_prob", "l1"])
def test_what_makes_up_for_what_ranks_leave_out(rescale: str) -> None:
    """Expected: as the function of a whole array does."""
    text = recipe_of("ties", ["a"]) | {"parameters": {"density": 0.4, "rescale": rescale}}
    base, a = arrays("base"), arrays("a")
    for name, array in merged(yaml.safe_dump(text)).items():
        change = by_size(a[name] - base[name], density=0.4, rescale=rescale)
        np.testing.assert_allclose(array, base[name] + change, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "layer"}, "scope: expected tensor or model, found 'layer'"),
        (
            {"scope": "model", "density": [0.1, 0.9]},
            "scope=model takes one density and gamma for all tensors of a; found 0.1, 0 for model.embed_",
        ),
    ],
)
def test_shares_of_which_no_threshold_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merged(yaml.safe_dump(recipe_of("ties", ["a", "b"]) | {"parameters": changes}))


def test_some_tensors_may_be_ranked_by_themselves() -> None:
    text = recipe_of("ties", ["a"]) | {"parameters": {"density": 0.3}}
    mixed = [{"filter": "mlp", "value": "model"}, "tensor"]
    found = merged(yaml.safe_dump(text | {"parameters": {"density": 0.3, "scope": mixed}}))
    alone = merged(yaml.safe_dump(text))
    differing = [name for name, array in found.items() if not np.array_equal(array, alone[name])]
    assert differing and all("mlp" in name for name in differing)
