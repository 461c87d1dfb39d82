"""Recipes are read strictly, and every tensor of the result is what its method makes of the right tensors."""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml

from tests.models.tiny import LLAMA, tiny_checkpoint
from xlathe.card import Card
from xlathe.errors import CheckpointError, OptionError
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.gguf import read_gguf, write_gguf
from xlathe.models.formats.huggingface import read_huggingface, write_huggingface
from xlathe.models.pretrained import from_pretrained
from xlathe.passes.merge.masks import by_chance
from xlathe.passes.merge.merge import merge
from xlathe.passes.merge.methods import METHODS
from xlathe.passes.merge.recipe import parse_recipe
from xlathe.safetensors_file import Tensor
from xlathe.tools.main import main

LAYERS = 5
SHAPES = {
    "model.embed_tokens.weight": (11, 4),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in range(LAYERS)},
    **{f"model.layers.{i}.mlp.experts.{e}.weight": (6, 4) for i in range(LAYERS) for e in range(2)},
    "model.norm.weight": (4,),
    "lm_head.weight": (11, 4),
}


def made(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: Any = np.float32) -> Checkpoint:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    return Checkpoint(Card({"model_type": "llama", "num_hidden_layers": LAYERS}), tensors, f"m{seed}")


MODELS = {name: made(seed) for seed, name in enumerate(["base", "a", "b", "c"])}


def merged(text: str, opened: Mapping[str, Checkpoint] = MODELS, seed: int = 0) -> dict[str, np.ndarray]:
    found = merge(parse_recipe(yaml.safe_load(text), "recipe"), opened, seed)
    return {name: tensor.read() for name, tensor in found.tensors.items()}


def arrays(name: str) -> dict[str, np.ndarray]:
    return {key: tensor.read() for key, tensor in MODELS[name].tensors.items()}


def test_filters_and_gradients_give_each_tensor_its_weight() -> None:
    """Between the numbers of a list on a line over layers; outside of layers the first; the first filter that fits."""
    text = """
    merge_method: linear
    models:
      - model: a
        parameters: {weight: [{filter: self_attn, value: 1.0}, {filter: mlp, value: [0, 0.5, 1]}, 0.25]}
      - model: b
        parameters: {weight: 0.5}
    parameters: {normalize: false}
    """
    found, a, b = merged(text), arrays("a"), arrays("b")
    assert found.keys() == SHAPES.keys() and list(found)[-1] == "lm_head.weight"
    for name, array in found.items():
        layer = int(name.split(".")[2]) if "layers" in name else None
        weight = 1.0 if "self_attn" in name else layer / 4 if layer is not None else 0.25
        np.testing.assert_allclose(array, weight * a[name] + 0.5 * b[name], rtol=1e-6, atol=1e-6)


def test_slices_stack_layers() -> None:
    text = """
    merge_method: passthrough
    slices:
      - sources: [{model: a, layer_range: [0, 3]}]
      - sources: [{model: b, layer_range: [1, 5], parameters: {scale: [{filter: q_proj, value: 0.0}]}}]
    """
    recipe = parse_recipe(yaml.safe_load(text), "recipe")
    result = merge(recipe, MODELS)
    found, a, b = {name: tensor.read() for name, tensor in result.tensors.items()}, arrays("a"), arrays("b")
    assert result.card.config["num_hidden_layers"] == 7
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], b["lm_head.weight"])
    for to, (source, layer) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3), (b, 4)]):
        name = "model.layers.{}.mlp.experts.1.weight"
        np.testing.assert_array_equal(found[name.format(to)], source[name.format(layer)])
        attention = found[f"model.layers.{to}.self_attn.q_proj.weight"]
        assert np.any(attention) == (source is a)


def test_layers_that_a_model_does_not_have() -> None:
    text = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [3, 9]}]}]}
    with pytest.raises(OptionError, match=r"layer_range \[3, 9\] of a, which has 5 layers"):
        merged(yaml.safe_dump(text))


def test_one_filter_for_all_and_the_last_number_after_the_layers() -> None:
    text = """
    merge_method: slerp
    base_model: base
    models: [{model: a}]
    parameters: {t: [{filter: self_attn, value: 0}, {filter: "*", value: [0, 0.25, 1]}]}
    """
    found, base, a = merged(text), arrays("base"), arrays("a")
    for name, expected in {"model.embed_tokens.weight": base, "model.norm.weight": a, "lm_head.weight": a}.items():
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
    assert merged(text.replace('filter: "*", ', "")).keys() == found.keys()


def test_adapters_are_part_of_a_models_name() -> None:
    """Expected: the same of a key of its own and of mergekit's `base+adapter`."""
    listed = [{"model": "a", "lora": "x"}, {"model": "b+y"}]
    recipe = parse_recipe({"merge_method": "linear", "models": listed}, "recipe")
    assert recipe.models == ("a+x", "b+y")


@pytest.mark.parametrize("row_wise", [True, False])
def test_the_vectors_of_nuslerp(row_wise: bool) -> None:
    """Rows, or columns: each goes along an arc of its own."""
    text = recipe_of("nuslerp", ["a", "b"]) | {"parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}}
    name = "model.layers.0.mlp.experts.0.weight"
    found, *given = (each[name] for each in (merged(yaml.safe_dump(text)), arrays("a"), arrays("b")))
    axis = 1 if row_wise else 0
    a, b = (x.astype(np.float64) for x in given)
    lengths = [np.linalg.norm(x, axis=axis, keepdims=True) for x in (a, b)]
    angle = np.arccos((a * b).sum(axis=axis, keepdims=True) / (lengths[0] * lengths[1]))
    expected = np.sin(angle / 2) / np.sin(angle) * (a + b)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_model_stock_of_rows_is_another_than_of_tensors() -> None:
    text = recipe_of("model_stock", ["a", "b"])
    whole, rows = (merged(yaml.safe_dump(text | {"parameters": {"filter_wise": w}})) for w in (False, True))
    name = "model.layers.0.mlp.experts.0.weight"
    base, a, b = (arrays(each)[name].astype(np.float64) for each in ("base", "a", "b"))
    for i in range(len(base)):
        changes = a[i] - base[i], b[i] - base[i]
        cosine = changes[0] @ changes[1] / np.prod([np.linalg.norm(c) for c in changes])
        t = np.clip(2 * cosine / (1 + cosine), 0, 1)
        np.testing.assert_allclose(rows[name][i], base[i] + t / 2 * (changes[0] + changes[1]), atol=1e-5)
    assert not np.allclose(whole[name], rows[name], atol=1e-3)


def test_a_base_of_a_mean_has_the_settings() -> None:
    text = yaml.safe_dump(recipe_of("linear", ["a", "b"]) | {"base_model": "b"})
    config = {**MODELS["b"].card.config, "torch_dtype": "float16", "mine": 1}
    card = dataclasses.replace(MODELS["b"].card, config=config)
    opened = MODELS | {"b": dataclasses.replace(MODELS["b"], card=card)}
    result = merge(parse_recipe(yaml.safe_load(text + "out_dtype: bfloat16\n"), "recipe"), opened)
    assert result.card.config["mine"] == 1
    assert result.card.config["dtype"] == "bfloat16" and "torch_dtype" not in result.card.config


def test_what_is_no_number_is_not_written() -> None:
    huge = recipe_of("linear", ["a", "b"])
    huge["parameters"] = {"normalize": False}
    huge["models"][0]["parameters"] = {"weight": 1e39}
    with pytest.raises(CheckpointError, match=r"linear of .*: the result holds NaN or infinite numbers"):
        merged(yaml.safe_dump(huge))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_model_with_nan_is_named(method: str) -> None:
    """Signs and ranks would leave it out without a word."""
    name = "model.layers.0.self_attn.q_proj.weight"
    broken = arrays("b")[name].copy()
    broken[1, 2] = np.nan
    tensors = {**MODELS["b"].tensors, name: Tensor(broken.shape, broken.dtype, lambda: broken)}
    opened = MODELS | {"b": dataclasses.replace(MODELS["b"], tensors=tensors)}
    models = ["b", "a"][: min(METHODS[method].count[1], 2)]
    with pytest.raises(CheckpointError, match=rf"{method} of {name}: b holds NaN or infinite numbers"):
        merge(parse_recipe(recipe_of(method, models), "recipe"), opened).tensors[name].read()


@pytest.mark.parametrize(("method", "key"), [("breadcrumbs", "gamma"), ("della", "epsilon")])
def test_each_model_has_its_own(method: str, key: str) -> None:
    """Before: 0.3 for one model, 0 for the other. Expected: neither what all get with 0.3 nor with 0."""
    text = recipe_of(method, ["a", "b"])
    name = "model.embed_tokens.weight"

    def found(first: float, second: float) -> np.ndarray:
        for model, value in zip(text["models"], (first, second), strict=True):
            model["parameters"] = {"weight": 1.0, "density": 0.6, key: value}
        return merged(yaml.safe_dump(text))[name]

    both = found(0.3, 0.0)
    assert not np.array_equal(both, found(0.3, 0.3)) and not np.array_equal(both, found(0.0, 0.0))


def test_what_is_one_for_all_models() -> None:
    text = recipe_of("task_arithmetic", ["a", "b"])
    for model, factor in zip(text["models"], (1.0, 9.0), strict=True):
        model["parameters"] = {"weight": 0.5, "lambda": factor}
    with pytest.raises(OptionError, match=r"embed_tokens.weight: lambda is one for all models; found 1.0, 9.0"):
        merged(yaml.safe_dump(text))


def test_a_filter_of_nothing() -> None:
    text = recipe_of("linear", ["a"])
    text["models"][0]["parameters"] = {"weight": [{"filter": "mpl", "value": 9}, 0.5]}
    with pytest.raises(OptionError, match=r"weight: the filter 'mpl' is part of no tensor's name; there are mo"):
        merged(yaml.safe_dump(text))


def test_slices_of_models_with_other_tensors() -> None:
    fewer = {name: t for name, t in MODELS["b"].tensors.items() if name != "lm_head.weight"}
    more = {**MODELS["b"].tensors, "model.layers.1.self_attn.q_proj.bias": MODELS["b"].tensors["model.norm.weight"]}
    listed = [{"sources": [{"model": name, "layer_range": [i, i + 1]}]} for i, name in enumerate("ab")]
    recipe = parse_recipe({"merge_method": "passthrough", "slices": listed}, "recipe")
    for tensors, message in (
        (fewer, "b has no tensor 'lm_head.weight', which a has"),
        (more, r"layer 1 of b and a layer of a differ: one has no 'model.layers.\*.self_attn.q_proj.bias'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge(recipe, MODELS | {"b": dataclasses.replace(MODELS["b"], tensors=tensors)})


def test_numbers_that_vary_alike_are_chosen_together() -> None:
    """SCE of a model with itself is itself, whatever share of the numbers is chosen."""
    text = recipe_of("sce", ["a", "a"]) | {"parameters": {"select_topk": 0.3}}
    for name, array in merged(yaml.safe_dump(text)).items():
        np.testing.assert_allclose(array, arrays("a")[name], atol=1e-6)


def test_doubles_and_whole_numbers() -> None:
    """Doubles are written as such, of float32 results; whole numbers are the first model's."""
    arrays = {"w": np.ones((3, 3)), "ids": np.arange(4)}
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    opened = {name: dataclasses.replace(MODELS["a"], tensors=tensors) for name in ("a", "b")}
    found = merged(yaml.safe_dump(recipe_of("linear", ["a", "b"])), opened)
    assert found["w"].dtype == np.float64 and found["ids"].dtype == np.int64
    np.testing.assert_array_equal(found["ids"], arrays["ids"])


def test_what_chance_draws_depends_on_the_name_alone() -> None:
    text = """
    merge_method: dare_linear
    base_model: base
    models:
      - {model: a, parameters: {weight: 0.7, density: 0.5}}
      - {model: b, parameters: {weight: 0.3, density: 0.9}}
    parameters: {lambda: 2.0}
    """
    found, name = merged(text), "model.layers.3.self_attn.q_proj.weight"
    fewer = {key: value for key, value in reversed(SHAPES.items()) if "mlp" not in key}
    small = {
        model: dataclasses.replace(given, tensors={key: given.tensors[key] for key in fewer})
        for model, given in MODELS.items()
    }
    again = merged(text, small)
    for key in fewer:
        np.testing.assert_array_equal(found[key], again[key])
    assert not np.array_equal(found[name], merged(text, seed=1)[name])
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
    base, a, b = (arrays(each)[name] for each in ("base", "a", "b"))
    deltas = [(a - base, 0.5), (b - base, 0.9)]
    kept = [by_chance(jax.random.fold_in(key, i), d, density=p) for i, (d, p) in enumerate(deltas)]
    np.testing.assert_allclose(found[name], base + 2 * (0.7 * kept[0] + 0.3 * kept[1]), rtol=1e-6, atol=1e-6)


def recipe_of(method: str, models: list[str]) -> dict[str, Any]:
    """Every required parameter has the value with which equal models give themselves."""
    needed = METHODS[method]
    each = {"weight": 1 / len(models)} if "weight" in needed.each else {}
    shared = {"t": 0.5} if "t" in needed.shared else {}
    based = {"base_model": "base"} if needed.base == "needed" else {}
    listed = [{"model": model, "parameters": each} for model in models]
    return {"merge_method": method, "models": listed, "parameters": shared, **based}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_model_merged_with_itself_is_itself(method: str) -> None:
    """Also where the base is the model: nothing changed."""
    fewest, most = METHODS[method].count
    for count in sorted({fewest, min(most, 3)}):
        models = [f"m{i}" for i in range(count)]
        opened = dict.fromkeys(["base", *models], MODELS["a"])
        found = merged(yaml.safe_dump(recipe_of(method, models)), opened)
        for name, expected in arrays("a").items():
            np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)


ALONE = sorted(name for name, method in METHODS.items() if method.count[0] == 1)
WHOLLY = {"density": 1.0, "epsilon": 0.0, "t": 1.0, "gamma": 0.0}
"""With which one model's changes are all there."""


@pytest.mark.parametrize("method", ALONE)
def test_one_model_of_weight_1_is_itself(method: str) -> None:
    text = recipe_of(method, ["a"])
    known = METHODS[method].each.keys() | METHODS[method].shared.keys()
    text["parameters"] |= {name: value for name, value in WHOLLY.items() if name in known}
    text["parameters"] |= {"t": 100.0} if method == "nearswap" else {}  # a distance that all are within
    found = merged(yaml.safe_dump(text))
    for name, expected in arrays("a").items():
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)


CHANCE = ("dare", "della")
SYMMETRIC = sorted(name for name, method in METHODS.items() if method.count[1] > 1 and not name.startswith(CHANCE))


@pytest.mark.parametrize("method", SYMMETRIC)
def test_the_order_of_models_with_their_parameters_does_not_matter(method: str) -> None:
    """But for methods that draw by chance, where each place has draws of its own."""
    text = recipe_of(method, ["a", "b"] if METHODS[method].count[1] == 2 else ["a", "b", "c"])
    for each, weight in zip(text["models"], (0.5, 0.3, 0.9), strict=False):
        each["parameters"] = {name: weight for name in ("weight", "density") if name in METHODS[method].each}
    found = merged(yaml.safe_dump(text))
    turned = merged(yaml.safe_dump(text | {"models": text["models"][::-1]}))
    for name, array in found.items():
        np.testing.assert_allclose(array, turned[name], atol=2e-6, err_msg=name)


def test_ties_of_changes_that_agree_is_the_weighted_mean() -> None:
    """Where nothing is dropped: both models changed every number upwards."""
    base = arrays("base")
    changes = {"a": 0.5, "b": 2.0}
    opened = {"base": MODELS["base"]} | {
        model: dataclasses.replace(
            MODELS[model],
            tensors={n: Tensor(x.shape, x.dtype, lambda x=x, by=by: x + by * np.abs(x)) for n, x in base.items()},
        )
        for model, by in changes.items()
    }
    text = recipe_of("ties", ["a", "b"]) | {"parameters": {"density": 1.0}}
    for each, weight in zip(text["models"], (0.6, 0.2), strict=True):
        each["parameters"] = {"weight": weight}
    for name, array in merged(yaml.safe_dump(text), opened).items():
        mean = (0.6 * 0.5 + 0.2 * 2.0) / 0.8 * np.abs(base[name])
        np.testing.assert_allclose(array, base[name] + mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_chance_leaves_the_mean_of_seeds(method: str) -> None:
    """Expected: task arithmetic, within five standard errors: kept with p, a number over p has the variance
    (1 - p) / p of its square."""
    shapes, count = {"w": (6, 50)}, 200
    opened = {name: made(seed, shapes) for seed, name in enumerate(["base", "a"])}
    text = recipe_of(method, ["a"]) | {"parameters": {"density": 0.5}}
    draws = np.stack([merged(yaml.safe_dump(text), opened, seed)["w"] for seed in range(count)])
    base, a = (opened[name].tensors["w"].read() for name in ("base", "a"))
    least = 0.5 if method == "dare_linear" else 0.35
    error = np.abs(a - base) * np.sqrt((1 - least) / least / count)
    assert np.all(np.abs(draws.mean(axis=0) - a) <= 5 * error)


@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_shards_do_not_matter(method: str, tmp_path: Path) -> None:
    for name in ("base", "a"):
        for shard in (1000, 10**9):
            plain = tiny_checkpoint()
            by = 1 if name == "base" else 2
            tensors = {n: Tensor(t.shape, t.dtype, lambda t=t, by=by: by * t.read()) for n, t in plain.tensors.items()}
            write_huggingface(dataclasses.replace(plain, tensors=tensors), tmp_path / f"{name}{shard}", shard=shard)
    more = {"density": 0.4} | ({"scope": "model"} if method == "ties" else {})
    text = yaml.safe_dump(recipe_of(method, ["a"]) | {"parameters": more})
    whole, parts = (
        merged(text, {name: read_huggingface(tmp_path / f"{name}{shard}") for name in ("base", "a")})
        for shard in (10**9, 1000)
    )
    assert len(list((tmp_path / "a1000").glob("model-*.safetensors"))) > 3
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])


def test_sums_are_float32_and_rounded_once() -> None:
    dtype = ml_dtypes.bfloat16
    opened = {name: made(seed, dtype=dtype) for seed, name in enumerate(["base", "a", "b"])}
    text = yaml.safe_dump(recipe_of("task_arithmetic", ["a", "b"]))
    found = merged(text, opened)
    for name, array in found.items():
        base, a, b = (opened[each].tensors[name].read().astype(np.float32) for each in ("base", "a", "b"))
        assert array.dtype == dtype
        expected = (base + np.float32(0.5) * (a - base) + np.float32(0.5) * (b - base)).astype(dtype)
        assert np.mean(array != expected) < 0.01  # a float32 sum in another order
    wide = merged(text + "out_dtype: float32\n", opened)
    assert all(array.dtype == np.float32 for array in wide.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_method": "tie"}, "merge_method: no method 'tie'; did you mean 'ties'?"),
        ({"densty": 1}, "no key 'densty'"),
        ({"parameters": {"densty": 1}}, "recipe: parameters: no key 'densty'; did you mean 'density'?"),
        ({"parameters": {"density": {"filter": "mlp", "value": 1}}}, "density: expected a list of filters and values"),
        ({"parameters": {"density": [{"filter": "mlp"}]}}, "expected a value, and maybe a filter"),
        ({"merge_method": "della", "parameters": {"epsilon": 0.7}}, "density=0.7, epsilon=0.7: 0 to 1.4 are no ch"),
        (recipe_of("karcher", ["a"]) | {"parameters": {"max_iter": -1}}, "max_iter=-1: expected a whole number"),
        ({"dtype": ["float32"]}, r"dtype: no dtype \['float32'\]"),
        ({"parameters": {"density": 1.5}}, "model.embed_tokens.weight: density=1.5: expected a share"),
        ({"parameters": {"density": 0}}, "density=0: expected a share"),
        ({"parameters": {"normalize": 1}}, "normalize: expected true or false, found 1"),
        ({"parameters": {"lambda": "much"}}, "lambda: expected a number, found 'much'"),
        ({"parameters": {"rescale": "l2"}}, "rescale: expected one of True, False, none, keep_prob, l1, found 'l2'"),
        ({"models": [{"model": "a"}]}, "ties needs weight, and model.embed_tokens.weight has none"),
        ({"models": []}, "models: expected a list"),
        ({"models": [{"model": 3}]}, r"models\[0\]: model: expected a directory"),
        ({"models": [{"model": "a", "lora": 3}]}, "lora: expected an adapter's directory or name, found 3"),
        ({"models": [{"model": "a", "layer_range": [0, 2]}]}, "no key 'layer_range'"),
        ({"slices": []}, "expected either models or slices"),
        ({"base_model": None}, "ties needs a base_model"),
        ({"dtype": "float12"}, "dtype: no dtype 'float12'; did you mean"),
        ({"tokenizer_source": 3}, "source: expected union, base or a model, found 3"),
        ({"tokenizer_source": "base", "tokenizer": {}}, "expected either tokenizer or tokenizer_source"),
        ({"tokenizer": {"sorce": "base"}}, "recipe: tokenizer: no key 'sorce'; did you mean 'source'"),
        ({"tokenizer": {"pad_to_multiple_of": -8}}, "pad_to_multiple_of: expected a whole number of at least 1"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "one"}}}}}, "'x': source: expected a model, kind"),
    ],
)
def test_recipes_that_are_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merged(yaml.safe_dump(recipe_of("ties", ["a", "b"]) | changes))


@pytest.mark.parametrize(
    ("method", "models", "message"),
    [
        ("slerp", ["a", "b"], "slerp takes 1 models beside the base, found 2"),
        ("model_stock", ["a"], "model_stock takes at least 2 models beside the base, found 1"),
        ("passthrough", ["a", "b"], "passthrough takes 1 models, found 2"),
    ],
)
def test_too_few_or_too_many_models(method: str, models: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merged(yaml.safe_dump(recipe_of(method, models)))


@pytest.mark.parametrize("taken", [[0, 0], [2, 1], [0], "all", [0, 2, 4]])
def test_layers_that_are_none(taken: Any) -> None:
    text = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": taken}]}]}
    with pytest.raises(OptionError, match="layer_range: expected"):
        merged(yaml.safe_dump(text))


def test_models_that_do_not_fit() -> None:
    """Told before a number is read, by the first tensor that differs."""
    text = yaml.safe_dump(recipe_of("linear", ["a", "b"]))

    def without(change: Mapping[str, Any], **config: Any) -> dict[str, Checkpoint]:
        shapes = {name: shape for name, shape in {**SHAPES, **change}.items() if shape}
        other = made(2, shapes)
        card = dataclasses.replace(other.card, config={**other.card.config, **config})
        return {**MODELS, "b": dataclasses.replace(other, card=card)}

    for opened, message in [
        (without({"lm_head.weight": (12, 4)}), r"lm_head.weight is \[11, 4\] in a and \[12, 4\] in b: the vocab"),
        (without({"model.layers.2.mlp.experts.1.weight": None}), "b has no tensor 'model.layers.2.mlp.experts.1"),
        (without({"more": (3,)}), "a has no tensor 'more', which b has"),
        (without({}, model_type="gpt2"), "recipe: model_type is 'llama' in a and 'gpt2' in b"),
        (without({}, num_attention_heads=8), "recipe: num_attention_heads is None in a and 8 in b"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            merge(parse_recipe(yaml.safe_load(text), "recipe"), opened)


def test_what_a_method_refuses_names_the_tensor() -> None:
    opposite = {name: Tensor(t.shape, t.dtype, lambda t=t: -t.read()) for name, t in MODELS["a"].tensors.items()}
    opened = {"base": MODELS["a"], "b": dataclasses.replace(MODELS["b"], tensors=opposite)}
    text = {"merge_method": "slerp", "base_model": "base", "models": [{"model": "b"}], "parameters": {"t": 0.5}}
    with pytest.raises(CheckpointError, match=r"slerp of model.embed_tokens.weight: slerp: the tensors point in opp"):
        merged(yaml.safe_dump(text), opened)
    zero = recipe_of("linear", ["a", "b"])
    zero["models"][0]["parameters"] = {"weight": -0.5}
    with pytest.raises(OptionError, match=r"linear of .*: the weights -0.5, 0.5 have the sum 0"):
        merged(yaml.safe_dump(zero))


def test_a_merge_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Expected: the mean of two models, in a directory that opens; nothing is left where a merge fails."""
    plain = tiny_checkpoint()
    turned = {name: Tensor(t.shape, t.dtype, lambda t=t: t.read()[::-1]) for name, t in plain.tensors.items()}
    write_huggingface(plain, tmp_path / "a")
    write_huggingface(dataclasses.replace(plain, tensors=turned), tmp_path / "b")
    listed = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("a", "b")]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": listed}))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    assert "bytes of numbers" in capsys.readouterr().out
    found, *given = (read_huggingface(tmp_path / name).tensors for name in ("out", "a", "b"))
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.read(), (given[0][name].read() + given[1][name].read()) / 2, atol=1e-6)
    assert from_pretrained(tmp_path / "out").names("weight")
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "a")]) == 1
    assert "expected another place" in capsys.readouterr().err
    listed[0]["parameters"]["weight"] = -1.0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": listed}))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "none")]) == 1
    assert "have the sum 0" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("type", ["F32", "Q8_0"])
def test_a_gguf_file_is_merged_with_a_directory(type: str, tmp_path: Path) -> None:
    """Expected: the mean of the directory's numbers and what the file's blocks say, as the directory writes them."""
    plain = tiny_checkpoint({**LLAMA, "intermediate_size": 64})
    negative = {name: Tensor(t.shape, t.dtype, lambda t=t: -2 * t.read()) for name, t in plain.tensors.items()}
    write_huggingface(plain, tmp_path / "a")
    write_gguf(dataclasses.replace(plain, tensors=negative), tmp_path / "b.gguf", type)
    listed = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("a", "b.gguf")]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": listed}))
    assert main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    found, blocks = (read(tmp_path / name).tensors for read, name in ((read_huggingface, "out"), (read_gguf, "b.gguf")))
    assert found.keys() == plain.tensors.keys()
    for name, tensor in found.items():
        given = plain.tensors[name].read()
        np.testing.assert_allclose(tensor.read(), (given + blocks[name].read()) / 2, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(tensor.read(), -given / 2, atol=1e-6 if type == "F32" else 0.02)
