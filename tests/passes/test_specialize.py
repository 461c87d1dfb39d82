"""Sizes become numbers; the values stay the same bits."""

import numpy as np
import pytest

from tests.passes.decoding import fused, stepped
from tests.variants import DECODERS
from xlathe import jaxpr as ir
from xlathe.errors import OptionError
from xlathe.passes.specialize import Specialize, is_specialized

(LLAMA,) = (v for v in DECODERS if v.name == "llama")


def test_a_step_with_fixed_sizes() -> None:
    fixed = Specialize(tokens=4, selected=2, rows=3, slots=16)(stepped(LLAMA))
    assert is_specialized(fixed) is None
    assert fixed.aval("tokens").shape == (4,) and fixed.aval("cache/0").shape[:2] == (3, 16)
    assert not any(ir.is_symbolic(n) for e in fixed.jaxpr.eqns for v in e.outvars for n in v.aval.shape)


def test_one_size_at_a_time() -> None:
    half = Specialize(batch=2)(fused(LLAMA))
    assert "t" in (is_specialized(half) or "")
    whole = Specialize(length=5)(half)
    assert is_specialized(whole) is None
    tokens = np.random.default_rng(0).integers(0, 61, (2, 5))
    np.testing.assert_array_equal(whole(tokens), fused(LLAMA)(tokens))


def test_a_size_that_the_graph_has_not() -> None:
    with pytest.raises(OptionError, match=r"no size \['n'\]; it has \['b', 't'\]"):
        Specialize(tokens=3)(fused(LLAMA))
