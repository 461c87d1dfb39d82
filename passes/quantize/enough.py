"""How much calibration is enough, in one place: what is said where it is not; nothing is refused for it.

What solves through x^T x (GPTQ and what starts from it, SparseGPT) needs as many tokens as a weight has columns, else
x^T x is singular and damping decides; ranges chosen by it (AWQ's clip) are open in the same directions. What reads
means and largest values of each column (an importance matrix, the scales of AWQ and SmoothQuant, the steps of static
activations) needs `TOKENS`: the mean square of normal numbers is within sqrt(2 / n) of its limit, a standard error of
one eighth there. Experts that no token chose are rounded to nearest, and named.
"""

from collections.abc import Mapping
from typing import Final

from xlathe.stats import InputStats

TOKENS: Final = 128


def unreached(seen: Mapping[str, InputStats]) -> tuple[str, ...]:
    """Returns a remark for each expert that no token chose."""
    return tuple(
        f"{name}: no token of the calibration chose this expert" for name, stats in seen.items() if not stats.count
    )


def few_for_products(seen: Mapping[str, InputStats]) -> tuple[str, ...]:
    """Returns a remark where fewer tokens than columns reached some weights, for what reads x^T x."""
    short = {name: stats for name, stats in seen.items() if 0 < stats.count < len(stats.absmax)}
    if not short:
        return ()
    columns = len(next(iter(short.values())).absmax)
    like = f"{len(short)} weights are like this"
    return (f"{_short(short)}, which sums over {columns} columns ({like}); x^T x leaves some open",)


def few_for_averages(seen: Mapping[str, InputStats]) -> tuple[str, ...]:
    """Returns a remark where fewer than `TOKENS` reached some weights, for what reads means and largest values."""
    short = {name: stats for name, stats in seen.items() if 0 < stats.count < TOKENS}
    if not short:
        return ()
    return (f"{_short(short)} ({len(short)} weights are like this); means and largest values take {TOKENS}",)


def _short(short: Mapping[str, InputStats]) -> str:
    name, stats = next(iter(short.items()))
    return f"the calibration is short: {int(stats.count)} tokens reached {name}"
