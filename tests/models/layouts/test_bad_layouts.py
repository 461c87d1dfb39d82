"""What no layout holds, and directories that are not what they say: one error that names the tensor or the setting."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xlathe as xl
from tests.models.layouts.cases import CONFIG, Case
from tests.models.layouts.damage import rewrite
from tests.models.layouts.write_models import FLOATS, float_graph, quantized_graph
from tests.models.tiny import GEMMA2, write_tiny
from xlathe import passes

Arrays, Said = dict[str, np.ndarray], dict[str, Any]
NEOX = {**CONFIG, "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu"}
KEY = "model.layers.0.self_attn.k_proj"
REFUSED = (
    ("gptq", "nf4:g32", "expected int8, int4, int3, int2; no layout does"),
    ("gptq", "fp8_e4m3:tensor", "expected int8, int4, int3, int2; layouts that do: compressed-tensors"),
    ("gptq", "int4:g32,a=int8_token", "expected activations as they are; layouts that do: compressed-tensors"),
    ("gptq", "int4:channel", r"expected scales of float16 \(s=f16\); layouts that do: compressed-tensors"),
    ("awq", "int8:g32", "expected int4; layouts that do: gptq, gptq_v2, compressed-tensors"),
    ("compressed-tensors", "int4:g32,z=f16", r"expected no zero points, or whole ones \(asym\); no layout does"),
    ("compressed-tensors", "fp8_e5m2:tensor", "expected int8, int4, int3, int2 or fp8_e4m3"),
    ("compressed-tensors", "int8:g32,a=int8", "expected activations as they are, or with one step"),
)


@pytest.mark.parametrize(("layout", "scheme", "reason"), REFUSED)
def test_schemes_without_a_place(layout: str, scheme: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(xl.CheckpointError, match=rf"_proj\.weight is {scheme}, which {layout} does not hold: {reason}"):
        quantized_graph(Case(layout, scheme)).save_pretrained(tmp_path / "b", layout=layout)
    assert not (tmp_path / "b").exists()


def test_other_refusals_of_writing(tmp_path: Path) -> None:
    with pytest.raises(xl.OptionError, match=r"no layout 'gptq2'; did you mean"):
        quantized_graph(Case("gptq", "int4:g32")).save_pretrained(tmp_path / "b", layout="gptq2")
    with pytest.raises(xl.CheckpointError, match="layout=gptq: expected quantized weights"):
        float_graph().save_pretrained(tmp_path / "b", layout="gptq")
    two = passes.Quantize("int4:g32", rules=(*FLOATS, (".*/down/.*", "int4:g64")))
    with pytest.raises(xl.CheckpointError, match=r"gptq holds one scheme, found .*_proj in int4:g.*compressed-tensors"):
        xl.Pipeline([two])(float_graph()).save_pretrained(tmp_path / "b", layout="gptq")


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize(("config", "head"), [(CONFIG, "lm_head"), (NEOX, "embed_out")], ids=["llama", "gpt_neox"])
def test_a_quantized_head(layout: str, config: Said, head: str, tmp_path: Path) -> None:
    """By the name that the family has for it."""
    graph = xl.from_pretrained(write_tiny(tmp_path / "a", config))
    step = passes.Quantize("int4:g32", rules=(("embedding/.*", "none"),))
    reason = rf"{head}\.weight is int4:g32, which {layout} does not hold: its readers take a head of floats"
    with pytest.raises(xl.CheckpointError, match=reason):
        xl.Pipeline([step])(graph).save_pretrained(tmp_path / "b", layout=layout)


def test_layers_that_differ(tmp_path: Path) -> None:
    """Before: a layer in floats beside one in int4. Expected: refused, as transformers would take both for int4."""
    graph = xl.Pipeline([passes.Quantize("int4:g32", rules=(*FLOATS, ("layers/1/.*", "none")))])(float_graph())
    with pytest.raises(xl.CheckpointError, match=r"gptq: model\.layers\.1\..*_proj is in floats.*-tensors and awq"):
        graph.save_pretrained(tmp_path / "b", layout="gptq")
    graph.save_pretrained(tmp_path / "b", layout="awq")
    assert "model.layers.1.self_attn.q_proj" in quantization(tmp_path / "b")["modules_to_not_convert"]


def test_a_tied_head_is_no_linear_module(tmp_path: Path) -> None:
    graph = xl.Pipeline([passes.Quantize("int8")])(xl.from_pretrained(write_tiny(tmp_path / "a", GEMMA2)))
    with pytest.raises(xl.CheckpointError, match=r"embedding/embedding is int8:channel, and .* linear layers alone; a"):
        graph.save_pretrained(tmp_path / "b", layout="compressed-tensors")


def test_numbers_without_a_place(tmp_path: Path) -> None:
    """A failure while numbers are written leaves what was there."""
    graph, name = quantized_graph(Case("gptq", "int4:g32,asym")), "layers/0/attention/key/kernel"
    graph.save_pretrained(tmp_path, layout="gptq")
    before = (tmp_path / "model.safetensors").read_bytes()
    for part, value, reason in (
        ("zero", 0, "qzeros: a zero point of 0"),
        ("scale", 1e30, "scales: expected numbers that"),
    ):
        array = np.asarray(graph.weights[f"{name}.{part}"]).copy()
        array[0, 0] = value
        stored = {n: graph.weights[n] for n in graph.names("weight", "const")} | {f"{name}.{part}": array}
        with pytest.raises(xl.CheckpointError, match=rf"{KEY}\.{reason}"):
            graph.replace(weights=type(graph.weights)(stored)).save_pretrained(tmp_path, layout="gptq")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def put(suffix: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def change(held: Arrays) -> None:
        held[f"{KEY}.{suffix}"] = make(held[f"{KEY}.{suffix}"])

    return change


def reason_of(value: Any) -> str:
    """Names a case after its message: what changes the files is a function, whose address no two processes share."""
    return value[:40] if isinstance(value, str) else ""


def add(suffix: str, array: np.ndarray) -> Callable[[Arrays], None]:
    return lambda held: held.update({f"{KEY}.{suffix}": array})


def say(**changes: Any) -> Callable[[Said], None]:
    return lambda said: said.update(changes)


def group(name: str, **changes: Any) -> Callable[[Said], None]:
    def change(said: Said) -> None:
        target = said["config_groups"]["group_0"]
        said["config_groups"]["group_0"] = {**target, name: {**(target[name] or {}), **changes}}

    return change


GPTQ_ARRAYS = (
    (lambda held: held.pop(f"{KEY}.qzeros"), rf"{KEY}\.qzeros: expected a tensor \[2, 4\], found none"),
    (lambda held: held.pop(f"{KEY}.qweight"), rf"{KEY}\.qweight: expected a tensor \[any, any\], found none"),
    (
        put("qweight", lambda a: a[:-1]),
        rf"{KEY}\.scales: expected \[2, 32\]|{KEY}\.g_idx: expected \[56\], found \[64\]",
    ),
    (put("qweight", lambda a: a.astype(np.int64)), rf"{KEY}\.qweight: expected int32, found int64"),
    (put("scales", lambda a: a[:1]), rf"{KEY}\.scales: expected \[2, 32\], found \[1, 32\]"),
    (
        put("scales", lambda a: a.astype(np.float64)),
        rf"{KEY}\.scales: expected float32 or float16 or bfloat16, found fl",
    ),
    (put("qzeros", lambda a: a[:, :1]), rf"{KEY}\.qzeros: expected \[2, 4\], found \[2, 1\]"),
    (put("qzeros", lambda a: a + 1), rf"{KEY}\.qzeros: expected 8 everywhere, since sym is true, found 9"),
    (put("g_idx", lambda a: a + 1), rf"{KEY}\.g_idx: expected groups from 0 to 1, found \[1, 2\]"),
    (add("weight", np.ones((32, 64), np.float32)), rf"{KEY}\.weight: expected none: nothing reads it"),
    (put("scales", lambda a: a * np.float16(np.nan)), r"k_proj\.weight' \(scale\) holds 64 numbers that are NaN"),
)
GPTQ_SETTINGS = (
    (say(bits=5), r"quantization_config: bits: expected one of 2, 3, 4, 8, found 5"),
    (say(bits=8), r"\.scales: expected|\.qzeros: expected|\.g_idx: expected"),
    (say(group_size=0), "group_size: expected -1 or a positive whole number, found 0"),
    (say(group_size=None), "group_size: expected -1 or a positive whole number"),
    (say(group_size=64), r"\.scales: expected \[1, \d+\], found \[2, \d+\]"),
    (say(checkpoint_format="marlin"), "checkpoint_format: expected one of gptq, gptq_v2, found 'marlin'"),
    (say(pack_dtype="int8"), "pack_dtype is 'int8': expected words of int32"),
    (say(sym="yes"), "sym: expected true or false, found 'yes'"),
    (say(quant_method="bitsandbytes"), "quant_method 'bitsandbytes': expected one of gptq, awq, compressed-tensors"),
    (say(dynamic={"+:.*down.*": {"bits": 8}}), "dynamic: .* expected the same form for all"),
    (say(permutation=3), "quantization_config: permutation is 3: expected no setting of that name"),
)
COMPRESSED = (
    (say(ignore=["re:*"]), r"ignore: .*re:\*.* is no expression"),
    (say(ignore=["re:.*k_proj"]), rf"{KEY}\.weight_scale: expected none: `ignore`"),
    (say(ignore="lm_head"), "ignore: expected a list of strings"),
    (say(format="marlin-24"), "format: expected one of .*pack-quantized"),
    (say(config_groups={}), "config_groups: expected at least one group"),
    (say(sparsity_config={"format": "dense"}), "sparsity_config is .*expected no setting of that name"),
    (group("weights", num_bits=5), "type, num_bits: expected what pack-quantized holds, found 'int, 5'"),
    (group("weights", group_size=-2), "group_size: expected -1 or a positive"),
    (group("weights", strategy="tensor_group"), "strategy: expected one of block, channel, group, tensor"),
    (group("weights", actorder="group"), "actorder: expected weight, or none"),
    (group("weights", symmetric=False), r"q_proj\.weight_zero_point: expected a tensor \[8, 2\], found none"),
)
COMPRESSED_ARRAYS = (
    *(
        (add(suffix, np.ones(shape, dtype)), rf"{KEY}\.{suffix}: expected none: nothing reads it")
        for suffix, shape, dtype in (
            ("weight", (32, 64), np.float32),
            ("weight_zero_point", (4, 2), np.int32),
            ("weight_g_idx", (64,), np.int32),
            ("input_scale", (1,), np.float32),
        )
    ),
    (put("weight_shape", lambda a: a * 2), rf"{KEY}\.weight_packed: expected what weight_shape \[64, 128\] takes"),
    (put("weight_shape", lambda a: -a), rf"{KEY}\.weight_packed: expected what weight_shape"),
    (put("weight_packed", lambda a: a[:, :3]), rf"{KEY}\.weight_packed: expected what weight_shape"),
    (put("weight_scale", lambda a: a[:, :1]), rf"{KEY}\.weight_scale: expected \[32, 2\], found \[32, 1\]"),
    (lambda held: held.pop(f"{KEY}.weight_scale"), rf"{KEY}\.weight_scale: expected a tensor \[32, 2\], found none"),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of a layout; whoever changes it changes it back."""
    folder, made = tmp_path_factory.mktemp("layouts"), set()

    def find(layout: str) -> Path:
        if layout not in made:
            quantized_graph(Case(layout, "int4:g32")).save_pretrained(folder / layout, layout=layout)
            made.add(layout)
        return folder / layout

    return find


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("config.json", "model.safetensors"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


@pytest.mark.parametrize(("change", "reason"), [*GPTQ_ARRAYS, *COMPRESSED_ARRAYS], ids=reason_of)
def test_damaged_tensors(change: Any, reason: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    layout = "gptq" if (change, reason) in GPTQ_ARRAYS else "compressed-tensors"
    folder = rewrite(copy(written(layout), tmp_path / "a"), arrays=change)
    with pytest.raises(xl.CheckpointError, match=reason):
        read_all(folder)


@pytest.mark.parametrize(("change", "reason"), [*GPTQ_SETTINGS, *COMPRESSED], ids=reason_of)
def test_settings_that_are_wrong(change: Any, reason: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    layout = "gptq" if (change, reason) in GPTQ_SETTINGS else "compressed-tensors"
    folder = rewrite(copy(written(layout), tmp_path / "a"), settings=change)
    with pytest.raises(xl.CheckpointError, match=reason):
        read_all(folder)


def test_levels_beyond_their_bits(tmp_path: Path) -> None:
    quantized_graph(Case("compressed-tensors", "int4:g32,a=int8_token")).save_pretrained(
        tmp_path, layout="compressed-tensors"
    )
    rewrite(tmp_path, put("weight", lambda a: np.where(np.arange(64) == 3, np.int8(9), a)))
    with pytest.raises(xl.CheckpointError, match=rf"{KEY}\.weight: expected whole numbers of 4 bits, found 9"):
        read_all(tmp_path)


def quantization(folder: Path) -> Said:
    return json.loads((folder / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


def read_all(folder: Path) -> None:
    graph = xl.from_pretrained(folder)
    graph.weights.prepare(list(graph.names("weight")))
