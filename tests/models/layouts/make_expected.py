"""Writes what other tools make of our directories, and of codes, for the tests to compare with. Run by hand:

    python -m tests.models.layouts.write_models FOLDER                       # in our environment
    ENV/bin/pip install torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0
    ENV/bin/pip install --no-deps auto-gptq==0.7.1 autoawq==0.2.9 optimum gptqmodel==7.7.0
    ENV/bin/pip install accelerate device-smi logbar tokenicer pypcre defuser threadpoolctl datasets
    ENV/bin/python -m tests.models.layouts.make_expected FOLDER          # in the root of the repository

`expected.safetensors`: of each of `MODELS` the float32 logits [2, 20, vocab] of transformers, which runs GPTQ and AWQ
by GPTQModel; of each of `MODULES` the tensors that the tool packs its codes into, and `weight`, float32 [n, k], that it
unpacks them to.
"""

import sys
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tests.models.layouts.cases import MODELS, MODULES, SIZE, TOKENS, Module

EXPECTED = Path(__file__).parent / "expected.safetensors"
PACKAGES = ("torch", "transformers", "compressed-tensors", "gptqmodel", "auto-gptq", "autoawq")


def main() -> None:
    arrays = {}
    for case in MODELS:
        arrays[f"{case.name}/logits"] = logits(Path(sys.argv[1]) / case.name)
    for module in MODULES:
        arrays |= {f"{module.name}/{name}": array for name, array in packed(module).items()}
    save_file(arrays, EXPECTED, {name: version(name) for name in PACKAGES})


@torch.no_grad()
def logits(folder: Path) -> np.ndarray:
    """With zero points the weights are unpacked as they are loaded: packed, versions 5.24 and 0.20 expect zero points
    of another shape than compressed-tensors itself writes."""
    with_zeros = folder.name.startswith("compressed-tensors") and "asym" in folder.name
    unpacked = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if with_zeros else {}
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True, **unpacked
    )
    assert not any(report.values()), report
    return model.eval()(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()


def packed(module: Module) -> dict[str, np.ndarray]:
    made = {"gptq": by_autogptq, "awq": by_autoawq, "compressed-tensors": by_compressed_tensors}[module.layout](module)
    np.testing.assert_array_equal(made["weight"].numpy(), module.weight())
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in made.items()}


def linear(module: Module) -> torch.nn.Linear:
    layer = torch.nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data = torch.from_numpy(module.weight())
    return layer


def submodule(package: str, name: str) -> types.ModuleType:
    """Imports a module of a package without running the package's own `__init__`, which wants other versions."""
    parts, spec = name.split("."), sys.modules.get(package) or find_spec(package)
    root = Path(spec.__path__[0] if isinstance(spec, types.ModuleType) else spec.submodule_search_locations[0])
    for i in range(len(parts)):
        path = ".".join([package, *parts[:i]])
        stub = types.ModuleType(path)
        stub.__path__ = [str(root.joinpath(*parts[:i]))]
        sys.modules.setdefault(path, stub)
    return __import__(f"{package}.{name}", fromlist=["_"])


@torch.no_grad()
def by_autogptq(module: Module) -> dict[str, torch.Tensor]:
    """Version 1. Its layer unpacks by multiplying with an identity, here in float32."""
    reference = submodule("auto_gptq", "nn_modules.qlinear.qlinear_cuda_old").QuantLinear
    _, zeros, scales = module.codes()
    layer = reference(module.bits, module.group or -1, SIZE, SIZE, bias=False, weight_dtype=torch.float32)
    layer.pack(linear(module), torch.from_numpy(scales).float(), torch.from_numpy(zeros).float(), None)
    weight = layer(torch.eye(SIZE)).T
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "g_idx")}
    return {**tensors, "scales": layer.scales.half(), "weight": weight}


@torch.no_grad()
def by_autoawq(module: Module) -> dict[str, torch.Tensor]:
    gemm = submodule("awq", "modules.linear.gemm")
    _, zeros, scales = module.codes()
    shared = [torch.from_numpy(array.T.astype(np.float32)) for array in (scales, zeros)]
    layer = gemm.WQLinear_GEMM.from_linear(linear(module), 4, module.group or SIZE, scales=shared[0], zeros=shared[1])
    tensors = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
    weight = gemm.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, module.group or SIZE).T
    return {**tensors, "weight": weight}


@torch.no_grad()
def by_compressed_tensors(module: Module) -> dict[str, torch.Tensor]:
    shared = {"strategy": "group", "group_size": module.group} if module.group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=module.bits, symmetric=not module.zeros, **shared)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    _, zeros, scales = module.codes()
    levels = torch.from_numpy(zeros.astype(np.int16) - 2 ** (module.bits - 1)).to(torch.int8)
    state = {"weight": torch.from_numpy(module.weight()), "weight_scale": torch.from_numpy(scales).float()}
    made = compressor.compress(state | {"weight_zero_point": levels}, scheme)
    weight = compressor.decompress(made, scheme)["weight"]
    return {**made, "weight_scale": made["weight_scale"].half(), "weight": weight}


if __name__ == "__main__":
    main()
