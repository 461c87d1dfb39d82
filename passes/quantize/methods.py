"""Methods of rounding, and of setting weights to zero, by name."""

from collections.abc import Mapping

from xlathe.errors import OptionError
from xlathe.pass_text import parse_passes, pass_name
from xlathe.passes.prune.sparse import Magnitude, SparseGpt, Wanda
from xlathe.passes.quantize.auto_round import AutoRound
from xlathe.passes.quantize.calibrated import Clip, Gptq, Hqq, Search
from xlathe.passes.quantize.method import Method
from xlathe.passes.quantize.rtn import Rtn

METHODS: Mapping[str, type[Method]] = {
    pass_name(cls): cls for cls in (Rtn, Search, Hqq, Clip, Gptq, AutoRound, Magnitude, Wanda, SparseGpt)
}


def find_method(text: str) -> Method:
    """Returns the method of a text, `gptq{act_order=False}`. Raises OptionError for unknown methods and options."""
    try:
        (method,) = parse_passes(text, METHODS)
    except OptionError as error:
        raise OptionError(f"method: {str(error).replace('unknown pass', 'unknown method')}") from None
    except ValueError:
        raise OptionError(f"method={text!r}: expected one method of {', '.join(METHODS)}") from None
    assert isinstance(method, Method)
    return method
