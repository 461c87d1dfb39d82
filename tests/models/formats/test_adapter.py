"""Adapters folded into weights, beside W + alpha / r B A written out in NumPy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.tiny import tiny_checkpoint, write_tiny
from xlathe.errors import CheckpointError
from xlathe.models.formats.adapter import fold_adapter
from xlathe.models.formats.checkpoints import open_adapted

RANK, ALPHA = 3, 12
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {QUERY: (32, 32), DOWN: (32, 48)}


def factors(turned: bool = False) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(5), {}
    for module, shape in SHAPES.items():
        outputs, inputs = shape[::-1] if turned else shape
        found[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(RANK, inputs)).astype(np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(outputs, RANK)).astype(np.float32)
    return found


def written(folder: Path, arrays: Mapping[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    save_file(dict(factors() if arrays is None else arrays), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, {QUERY: 4, DOWN: 4}),
        ({"use_rslora": True}, {QUERY: 12 / np.sqrt(3), DOWN: 12 / np.sqrt(3)}),
        ({"r": 8, "rank_pattern": {"proj": RANK}, "alpha_pattern": {"q_proj": 6}}, {QUERY: 2, DOWN: 4}),
        ({"alpha_pattern": {"layers.0.mlp.down_proj": 3}}, {QUERY: 4, DOWN: 1}),
    ],
    ids=["alpha over r", "rslora", "one module", "one layer"],
)
def test_the_product_is_added(config: dict[str, Any], scales: dict[str, float], tmp_path: Path) -> None:
    """Expected: of float32, rounded once; all other tensors are the base's."""
    base, arrays = tiny_checkpoint(dtype=ml_dtypes.bfloat16), factors()
    found = fold_adapter(base, written(tmp_path, **config))
    assert list(found.tensors) == list(base.tensors)
    for name, tensor in found.tensors.items():
        module, before = name.removesuffix(".weight"), base.tensors[name].read()
        expected = before.astype(np.float64)
        if module in scales:
            a, b = (arrays[f"base_model.model.{module}.lora_{each}.weight"].astype(np.float64) for each in "AB")
            expected = expected + scales[module] * b @ a
        result = tensor.read()
        assert result.dtype == before.dtype and tensor.shape == result.shape
        np.testing.assert_allclose(result.astype(np.float64), expected, rtol=2**-8, atol=1e-5)
        assert np.array_equal(result, before) == (module not in scales)


def test_weights_that_are_stored_inputs_first(tmp_path: Path) -> None:
    """Of GPT-2: W [inputs, outputs], which A [r, inputs] and B [outputs, r] are turned for."""
    base, arrays = tiny_checkpoint(), factors(turned=True)
    found = fold_adapter(base, written(tmp_path, arrays, fan_in_fan_out=True))
    a, b = (arrays[f"base_model.model.{DOWN}.lora_{each}.weight"] for each in "AB")
    assert a.shape == (RANK, 32) and b.shape == (48, RANK)
    expected = base.tensors[f"{DOWN}.weight"].read() + 4 * (b @ a).T
    np.testing.assert_allclose(found.tensors[f"{DOWN}.weight"].read(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected LORA, found 'LOHA'"),
        ({"use_dora": True}, "use_dora is True: such adapters are not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]: such adapters are not supported"),
        ({"bias": "all"}, "bias: expected 'none', found 'all'"),
        ({"lora_alpha": "much"}, "lora_alpha: expected a number for .* of rank 3, found 'much'"),
    ],
)
def test_adapters_that_are_more_than_a_product(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        fold_adapter(tiny_checkpoint(), written(tmp_path, **config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{QUERY}.lora_magnitude_vector": np.ones(3)},
            r"model.layers.1.*vector' \[3\] is no factor lora_A or lora_B",
        ),
        ({f"{QUERY}.lora_B.weight": None}, "model.layers.1.self_attn.q_proj has no lora_B"),
        ({f"{QUERY}.lora_B.weight": np.ones((32, 2))}, r"q_proj: A \[3, 32\] and B \[32, 2\] do not fit \[32, 32\]"),
        ({f"{QUERY}.lora_A.weight": np.ones((3, 48))}, r"q_proj: A \[3, 48\] and B \[32, 3\] do not fit \[32, 32\]"),
        ({"model.up.lora_A.weight": np.ones((3, 4))}, "changes 'model.up.weight', which test does not have"),
    ],
)
def test_factors_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = factors() | {f"base_model.model.{name}": array for name, array in change.items()}
    folder = written(tmp_path, {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(CheckpointError, match=message):
        fold_adapter(tiny_checkpoint(), folder)


def test_a_model_and_an_adapter_by_one_name(tmp_path: Path) -> None:
    """Also where a directory's own name has a plus in it; a pickle is not read."""
    plain, adapter = write_tiny(tmp_path / "a+b"), written(tmp_path / "adapter")
    opened = open_adapted(f"{plain}+{adapter}")
    expected = fold_adapter(open_adapted(str(plain)), adapter)
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(opened.tensors[name].read(), tensor.read())
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"holds adapter_model.bin, a pickle"):
        open_adapted(f"{plain}+{adapter}")
