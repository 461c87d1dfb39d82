"""What we write is what the layouts' own tools write and read, and theirs is read here (`make_expected.py`)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import xlathe as xl
from tests.models.layouts.cases import MODELS, MODULES, SIZE, TOKENS, Case, Module
from tests.models.layouts.write_models import quantized_graph
from tests.passes.decoding import difference
from xlathe.models.formats.checkpoints import open_checkpoint
from xlathe.models.formats.layouts import find_layout, read_layout
from xlathe.models.pretrained import to_graph
from xlathe.models.settings import Settings
from xlathe.safetensors_file import Packed, Tensor
from xlathe.storage import Scaled
from xlathe.storage.elements import pack_bits


@pytest.fixture(scope="module")
def expected() -> Mapping[str, np.ndarray]:
    with safe_open(Path(__file__).parent / "expected.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


FEW = (
    "gptq int4:g32, down in floats",
    "compressed-tensors int8:channel,a=int8_token",
    "compressed-tensors fp8_e4m3:b32x32",
    "compressed-tensors int4:g32, tied",
)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.breadth] * (case.name not in FEW)) for case in MODELS],
)
def test_transformers_reads_our_directory(case: Case, tmp_path: Path, expected: Mapping[str, np.ndarray]) -> None:
    """Theirs differs where it rounds what ours does not: GPTQModel unpacks to float16; compressed-tensors finds steps
    of int8 activations as the largest / 127.5, not / 127. Then both are at most twice as far apart as rounding is far.
    """
    quantized_graph(case).save_pretrained(tmp_path, layout=case.layout)
    ours, theirs = xl.from_pretrained(tmp_path)(TOKENS), expected[f"{case.name}/logits"]
    bound, scheme = 1e-5, case.scheme.partition(",a=int8")[0]
    if case.layout != "compressed-tensors":
        bound = max(bound, 2 * difference(unpacked(tmp_path, np.float16)(TOKENS), ours))
    elif scheme != case.scheme:
        bound = 2 * difference(quantized_graph(dataclasses.replace(case, scheme=scheme))(TOKENS), ours)
    assert difference(ours, theirs) <= bound <= 0.1


def unpacked(folder: Path, dtype: Any) -> xl.Graph:
    """Returns the graph of a directory whose weights are floats, rounded to a type."""
    checkpoint = open_checkpoint(folder)
    tensors = {name: whole(t.read().astype(dtype).astype(np.float32)) for name, t in checkpoint.tensors.items()}
    return to_graph(dataclasses.replace(checkpoint, tensors=tensors))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_theirs_is_read(module: Module, expected: Mapping[str, np.ndarray]) -> None:
    theirs = of_module(expected, module)
    weight = theirs.pop("weight")
    found = read_layout(Settings(settings(module)), {f"m.{name}": whole(array) for name, array in theirs.items()}, "t")
    np.testing.assert_array_equal(found.tensors["m.weight"].read(), weight)
    packed = found.tensors["m.weight"].packed
    assert packed is not None
    ours = our_parts(module)
    assert packed.format == ours.format and packed.parts.keys() == ours.parts.keys()
    for name, part in ours.parts.items():
        np.testing.assert_array_equal(packed.parts[name].read(), part.read())


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_ours_are_their_bytes(module: Module, expected: Mapping[str, np.ndarray]) -> None:
    theirs = of_module(expected, module)
    del theirs["weight"]
    made = find_layout(module.layout).tensors("m", our_parts(module), SIZE, SIZE)
    assert made.keys() == theirs.keys()
    for name, tensor in made.items():
        array = tensor.read()
        assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        np.testing.assert_array_equal(array, theirs[name])


def of_module(expected: Mapping[str, np.ndarray], module: Module) -> dict[str, np.ndarray]:
    prefix = f"{module.name}/"
    return {name.removeprefix(prefix): array for name, array in expected.items() if name.startswith(prefix)}


def whole(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


def our_parts(module: Module) -> Packed:
    """The codes of a module as our storage format has them."""
    codes, zeros, scales = module.codes()
    stored = Scaled(f"int{module.bits}", 1, module.group, "f16", "u8" if module.zeros else "")
    if module.bits == 8:
        held = codes if module.zeros else (codes.astype(np.int16) - 128).astype(np.int8)
    else:
        held = pack_bits(codes, module.bits)
    shape = stored.parts(SIZE, SIZE)["scale"].shape
    shared = {"scale": scales.reshape(shape)} | ({"zero": zeros.reshape(shape)} if module.zeros else {})
    return Packed(str(stored), {name: whole(array) for name, array in {"codes": held, **shared}.items()})


def settings(module: Module) -> dict[str, object]:
    """What config.json says of it."""
    group = module.group or -1
    if module.layout == "gptq":
        return {"quant_method": "gptq", "bits": module.bits, "group_size": group, "sym": not module.zeros}
    if module.layout == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    shared = {"strategy": "group", "group_size": group} if module.group else {"strategy": "channel"}
    weights = {"num_bits": module.bits, "symmetric": not module.zeros, **shared}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
