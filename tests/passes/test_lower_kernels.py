"""Operations become kernels where there are any, and their reference bodies elsewhere."""

import numpy as np
import pytest

from tests.passes.decoding import difference, fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, PassError
from xlathe.kernels import native
from xlathe.passes.lower_kernels import LowerKernels
from xlathe.passes.quantize import Quantize
from xlathe.passes.specialize import Specialize

(LLAMA,) = (v for v in DECODERS if v.name == "llama")


@pytest.mark.skipif(native.library() is None, reason="the package was built without a C++ compiler")
def test_quantized_products_run_in_the_kernel() -> None:
    quantized = Quantize()(fused(LLAMA))
    lowered = LowerKernels()(Specialize(batch=2, length=5)(quantized))
    calls = [e for e in lowered.jaxpr.eqns if e.primitive.name == "ffi_call"]
    assert len(calls) == 15 == lowered.history[-1].hits["quantized_dot: kernel"]
    tokens = np.random.default_rng(0).integers(0, 61, (2, 5))
    assert difference(lowered(tokens), quantized(tokens)) <= 1e-5


def test_no_operation_is_left() -> None:
    lowered = LowerKernels()(Specialize(batch=1, length=4)(fused(LLAMA)))
    assert not any(e.primitive.name.startswith("xlathe.") for e in lowered.jaxpr.eqns)
    assert lowered.history[-1].hits["attention: reference"] == LLAMA.layers


def test_sizes_must_be_known() -> None:
    with pytest.raises(PassError, match="run Specialize"):
        LowerKernels()(fused(LLAMA))


def test_unknown_target() -> None:
    with pytest.raises(OptionError, match="no target 'cpux'; the targets are cpu, h100, h200, tpu-v5e, tpu-v5p, tpu-v6e"):
        LowerKernels("cpux")
