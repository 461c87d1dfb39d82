"""Operations become kernels where there are any, and their reference bodies elsewhere."""

from typing import Any

import numpy as np
import pytest

from tests.passes.decoding import difference, fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.kernels import native
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.quantize import Quantize
from xlathe.passes.specialize import Specialize

LLAMA, TIED = (next(v for v in DECODERS if v.name == name) for name in ("llama", "tied_head"))


@pytest.mark.skipif(native.library() is None, reason="the package was built without a C++ compiler")
def test_quantized_products_run_in_the_kernel() -> None:
    quantized = Quantize()(fused(LLAMA))
    lowered = LowerKernels()(Specialize(batch=2, length=5)(quantized))
    calls = [e for e in lowered.jaxpr.eqns if e.primitive.name == "ffi_call"]
    assert len(calls) == 15 == lowered.history[-1].hits["quantized_dot: kernel"]
    tokens = np.random.default_rng(0).integers(0, 61, (2, 5))
    assert difference(lowered(tokens), quantized(tokens)) <= 1e-5


@pytest.mark.skipif(native.library() is None, reason="the package was built without a C++ compiler")
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"activations": "int8"}])
def test_int4_products_run_in_their_kernel(options: dict[str, Any]) -> None:
    """Expected: every product whose scheme is int4, the tied head too, is a call of the one kernel for its scheme."""
    quantized = Quantize("int4", **options)(fused(TIED))
    lowered = LowerKernels()(Specialize(batch=2, length=5)(quantized))
    calls = [e.params["target_name"] for e in lowered.jaxpr.eqns if e.primitive.name == "ffi_call"]
    assert set(calls) == {"xlathe.quantized_dot.int4" + "_a8" * bool(options.get("activations"))}
    assert len(calls) == lowered.history[-1].hits["quantized_dot: kernel"] > 0
    tokens = np.random.default_rng(0).integers(0, TIED.vocab, (2, 5))
    assert difference(lowered(tokens), quantized(tokens)) <= 1e-5


@pytest.mark.skipif(native.library() is None, reason="the package was built without a C++ compiler")
def test_a_group_without_a_kernel_is_told() -> None:
    lowered = LowerKernels()(Specialize(batch=1, length=4)(Quantize("int4", group=8)(fused(LLAMA))))
    assert lowered.history[-1].hits["quantized_dot: reference"] == 15
    assert any("int4 in groups of 32, 64" in note for note in lowered.history[-1].notes)


@pytest.mark.parametrize("target", ["tpu-v5e", "h100"])
def test_a_group_without_a_kernel_is_told_elsewhere_too(target: str) -> None:
    lowered = LowerKernels(target)(Specialize(batch=1, length=4)(Quantize("int4", group=8)(fused(LLAMA))))
    assert lowered.history[-1].hits["quantized_dot: reference"] == 15
    assert any("int4 in groups of 32, 64" in note and "int4:g8" in note for note in lowered.history[-1].notes)


def test_no_operation_is_left() -> None:
    lowered = LowerKernels()(Specialize(batch=1, length=4)(fused(LLAMA)))
    assert not any(e.primitive.name.startswith("xlathe.") for e in lowered.jaxpr.eqns)
    assert lowered.history[-1].hits["attention: reference"] == LLAMA.layers


def test_sizes_must_be_known() -> None:
    with pytest.raises(PassError, match="run Specialize"):
        LowerKernels()(fused(LLAMA))


def test_unknown_target() -> None:
    with pytest.raises(OptionError, match="no target 'cpux'; did you mean 'cpu'"):
        LowerKernels("cpux")
