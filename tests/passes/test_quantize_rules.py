"""Rules choose schemes by name, the plan says what will be done, and every scheme is what its graph computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xlathe as xl
from tests.passes.decoding import difference, fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph, Weights
from xlathe.passes import PASSES, Quantize
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.quantize.schemes import Scheme
from xlathe.passes.specialize import Specialize
from xlathe.report import weight_bytes

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
RULES = ((r"layers/0/.*", "none"), (r".*(up|gate|down).*", "int4:g16"), (r"layers/1/.*", "fp8_e4m3:channel"))
SCHEMES = [
    *("int8:tensor", "int8:g16,asym", "int3:g8", "int4:g8,z=f16", "fp8_e5m2:b16x16", "nf4:g16", "nvfp4", "mxfp8"),
    "int4:g16,50%",
]


def named(name: str) -> Graph:
    return fused(next(v for v in DECODERS if v.name == name))


@pytest.fixture(scope="module")
def llama() -> Graph:
    return named("llama")


def standing_for(before: Graph, after: Graph) -> Graph:
    """The graph before, each weight being what its parts after stand for."""
    arrays = dict(before.weights.stored)
    for recipe in after.weights.recipes:
        weight, make = arrays[recipe.source], recipe.make
        order = (*make.layout.free, *make.layout.contracted)
        matrix = np.asarray(make.scheme.stored.dequantize(*make(weight)))
        arrays[recipe.source] = matrix.reshape([weight.shape[i] for i in order]).transpose(np.argsort(order))
    return before.replace(weights=Weights(arrays))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_computes_what_its_scheme_says(scheme: str, tmp_path: Path) -> None:
    """Also the tied embedding, of which rows are looked up; and after it was saved and loaded."""
    before = named("tied_head")
    after = Quantize(scheme)(before)
    expected = standing_for(before, after)(TOKENS)
    assert difference(after(TOKENS), expected) <= 1e-5
    after.save(tmp_path)
    np.testing.assert_array_equal(xl.load_graph(tmp_path)(TOKENS), after(TOKENS))


@pytest.mark.parametrize("scheme", ["fp8_e4m3:channel,a=fp8_token", "int8:tensor,a=int8_token", "bf16"])
def test_what_has_no_kernel_is_told(llama: Graph, scheme: str) -> None:
    quantized = Quantize(scheme)(llama)
    lowered = LowerKernels()(Specialize(batch=2, length=9)(quantized))
    record = lowered.history[-1]
    assert record.hits["quantized_dot: reference"] == 15 and "quantized_dot: kernel" not in record.hits
    assert any("quantized_dot: expected" in note and scheme.partition(",")[0] in note for note in record.notes)
    assert difference(lowered(TOKENS), quantized(TOKENS)) <= 1e-5


def test_the_first_rule_that_matches_decides(llama: Graph) -> None:
    plan = Quantize(rules=RULES).plan(llama)
    assert {name.split("/")[1] for name in plan.schemes} == {"1"}
    found = {name: str(scheme) for name, scheme in plan.schemes.items()}
    assert found["layers/1/up/kernel"] == "int4:g16" and found["layers/1/attention/q_proj/kernel"] == "fp8_e4m3:channel"
    both = Quantize("int8", rules=RULES).plan(llama)
    extra = set(both.schemes) - set(plan.schemes)
    assert extra and all(str(both.schemes[name]) == "int8:channel" and "layers" not in name for name in extra)


def test_the_plan_is_what_is_applied(llama: Graph) -> None:
    quantize = Quantize("int4:g16", rules=RULES)
    plan, after = quantize.plan(llama), quantize(llama)
    told = json.loads(plan.to_json())
    assert told["bytes_before"] == weight_bytes(llama) and told["bytes_after"] == weight_bytes(after)
    for tensor in told["tensors"]:
        parts = [name for name in after.names("weight") if name.rpartition(".")[0] == tensor["name"]]
        assert bool(parts) == (tensor["scheme"] is not None)
        stored = after.weights.prepare(parts or [tensor["name"]])
        assert tensor["bytes_after"] == sum(np.asarray(array).nbytes for array in stored.values())
        assert tensor["bits"] == 8 * tensor["bytes_after"] / np.prod(tensor["shape"])
    lines = str(plan).splitlines()
    assert f"{weight_bytes(llama):,} bytes -> {weight_bytes(after):,}" in lines[-1]
    assert any("fp8_e4m3:channel" in line and "9.000" in line for line in lines)


def test_rules_as_text(llama: Graph) -> None:
    quantize = Quantize("int4:g16,asym", rules=RULES, method="rtn")
    text = str(quantize)
    (again,) = xl.Pipeline.parse(text, PASSES).passes
    assert again == quantize and str(again) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": (("lm_haed", "int8"),)}, "weights='lm_haed' matches no weight that is multiplied .* the graph has"),
        ({"rules": (("lm_haed", "none"),)}, "weights='lm_haed' matches no weight; the graph has"),
        ({"rules": ((".*", "int8"), ("layers/.*", "int4"))}, "'layers/.*' decides nothing: rules before it"),
        ({"rules": ((".*", "int4:g24"),)}, "group=24 does not divide 32; g16, g32 would|g2, g4, g8, g16, g32 would"),
    ],
)
def test_rules_that_do_not_fit_the_graph(llama: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Quantize(**options)(llama)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ((".*", "int9"),)}, "'int9' is not known"),
        ({"rules": (("(", "int8"),)}, "no regular expression"),
        ({"scheme": "nf4:a=int8"}, "a=int8 is for integers with whole zero points; a=int8_token and a=fp8"),
        ({"scheme": "int8:a=int9"}, "activations 'int9' is not known; did you mean 'int8'"),
        ({"scheme": "int8:a=int8_token,a=fp8_token"}, "exclude each other"),
        ({"rules": "first"}, "rules: expected pairs .* found 'f'"),
        ({"rules": (("first",),)}, r"rules: expected pairs .* found \('first',\)"),
        ({"scheme": "int4", "group": True}, "group=True: expected a positive number"),
        ({"scheme": "int4", "method": "auto_round{steps=0}"}, "steps=0: expected a positive number"),
    ],
)
def test_rules_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Quantize(**options)


def test_a_group_of_one_is_a_group() -> None:
    (rule,) = Quantize("int8", group=1).parsed_rules()
    assert str(rule.scheme) == "int8:g1"


@pytest.mark.parametrize("text", ["int8:channel", "int4:g32,asym,a=int8", "mxfp4:a=fp8_token", "fp8_e4m3:b128x128"])
def test_schemes_as_text(text: str) -> None:
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(("scheme", "value"), [("int8", np.nan), ("nvfp4", np.inf), ("bf16", -np.inf)])
def test_weights_that_are_not_finite_are_refused_by_name(llama: Graph, scheme: str, value: float) -> None:
    name = "lm_head/kernel"
    weight = np.array(llama.weights[name])
    weight[3, 5] = value
    broken = llama.replace(weights=Weights(dict(llama.weights.stored) | {name: weight}))
    quantized = Quantize(scheme)(broken)  # nothing is read before it is asked for
    with pytest.raises(PassError, match=rf"{name} has 1 of {weight.size} values that are not finite"):
        quantized(TOKENS)


@pytest.mark.parametrize("scheme", ["int8:channel,a=int8_static", "fp8_e4m3:tensor,a=fp8_static"])
def test_static_activations_come_from_calibration(llama: Graph, scheme: str) -> None:
    """Expected: the largest number that calibration saw is the last level."""
    from xlathe.passes.observe import observe
    from xlathe.pipeline import Context

    quantize = Quantize(scheme, weights="layers/0/.*")
    with pytest.raises(OptionError, match="calibration needs at least one batch"):
        quantize(llama)
    after = quantize(llama, Context(calibration=[TOKENS]))
    seen, last = observe(llama, [TOKENS]).inputs, 127 if "int8_static" in scheme else 448
    steps = [name for name in after.names("weight") if name.endswith(".input")]
    assert len(steps) == 7
    for name in steps:
        largest = seen[name.removesuffix(".input")].absmax.max()
        np.testing.assert_allclose(after.weights[name], largest / last, rtol=1e-6)
