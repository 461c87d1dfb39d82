"""Check a graph's structure, and compare what two graphs compute.

Metrics follow the usual definitions over next-token distributions: KL divergence and perplexity in nats, from
log-softmax in float64. Standard errors treat tokens as independent.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprTypeError, check_jaxpr

from xlathe import jaxpr as ir
from xlathe.errors import OptionError, PassError
from xlathe.graph import Graph
from xlathe.printer import type_text
from xlathe.step import ARGUMENTS

_BLOCK = 1 << 24  # logits that are held in float64 at a time
_LENIENT_ULPS = 4
_LARGEST_EXPONENT = 709.0  # of e, in float64


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"


class Model(Protocol):
    """What maps int32 tokens [b, t] to logits [b, t, vocab]; a graph does."""

    @property
    def vocab(self) -> int: ...

    def __call__(self, tokens: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the graph b differs from the graph a on the same tokens.

    max_relative: max |logits b - logits a| / max |logits a|.
    kl: mean over positions of KL(p_a || p_b), in nats a token.
    same_top1: the share of positions at which both prefer the same token.
    perplexity_a, perplexity_b: see `perplexity`.
    """

    max_relative: float
    kl: Estimate
    same_top1: Estimate
    perplexity_a: Estimate
    perplexity_b: Estimate


def compare(a: Model, b: Model, tokens: Any) -> Comparison:
    """Compares two graphs on int32 tokens [rows, length], length >= 2, row by row.

    Raises OptionError where the vocabularies differ or a row has no second token.
    """
    if a.vocab != b.vocab:
        raise OptionError(
            f"graphs of different vocabularies cannot be compared: {a.vocab} and {b.vocab} tokens"
        )
    rows = _rows(tokens)
    difference = largest = 0.0
    kl, same, losses_a, losses_b = [], [], [], []
    for row in rows:
        for start, block_a, block_b in _blocks(a(row)[0], b(row)[0]):
            difference = max(difference, float(np.abs(block_b - block_a).max()))
            largest = max(largest, float(np.abs(block_a).max()))
            log_a, log_b = _log_softmax(block_a), _log_softmax(block_b)
            kl.append(_kl(log_a, log_b))
            same.append((block_a.argmax(-1) == block_b.argmax(-1)).astype(np.float64))
            following = row[0, start + 1 : start + 1 + len(block_a)]
            losses_a.append(_losses(log_a, following))
            losses_b.append(_losses(log_b, following))
    return Comparison(
        difference / largest if largest else difference,
        _estimate(np.concatenate(kl)),
        _estimate(np.concatenate(same)),
        _perplexity(np.concatenate(losses_a)),
        _perplexity(np.concatenate(losses_b)),
    )


def perplexity(model: Model, tokens: Any) -> Estimate:
    """Returns exp(mean negative log-likelihood) of each token after the first, given those before it.

    tokens: int32 [rows, length], length >= 2. The error is that of the mean, carried through exp to first
    order.
    """
    losses = []
    for row in _rows(tokens):
        for start, block in _blocks(model(row)[0]):
            losses.append(_losses(_log_softmax(block), row[0, start + 1 : start + 1 + len(block)]))
    return _perplexity(np.concatenate(losses))


def check_equal(before: Graph, after: Graph, tokens: Any, rtol: float) -> None:
    """Raises PassError where two graphs differ on int32 tokens [b, t].

    rtol: allowed max |difference| / max |logits|; 0 demands equal bits. Where the graph computes in a dtype
    coarser than float32, a few units of its last place are allowed.
    """
    expected, found = np.asarray(before(tokens)), np.asarray(after(tokens))
    if rtol == 0.0:
        if not np.array_equal(expected, found, equal_nan=True):
            raise PassError(
                f"promised equal bits, but {int((expected != found).sum())} of {found.size} logits differ"
            )
        return
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    relative = float(np.abs(found - expected).max() / np.abs(expected).max())
    allowed = max(rtol, _LENIENT_ULPS * _coarsest_eps(before.jaxpr))
    if not relative <= allowed:
        raise PassError(f"promised a relative difference of at most {allowed:.1e}, found {relative:.1e}")


def _coarsest_eps(jaxpr: ir.Jaxpr) -> float:
    """Returns the spacing of the coarsest float dtype below float32 that a graph computes in, else 0."""
    dtypes = {out.aval.dtype for eqn in jaxpr.eqns for out in eqn.outvars}
    floats = [float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating) and d.itemsize < 4]
    return max(floats, default=0.0)


def _rows(tokens: Any) -> list[np.ndarray]:
    array = np.asarray(tokens)
    if array.ndim != 2 or array.shape[1] < 2:
        raise OptionError(
            f"expected tokens [rows, length] with a length of 2 or more, got {list(array.shape)}"
        )
    return [array[i : i + 1] for i in range(len(array))]


def _blocks(*logits: Any) -> Iterator[tuple[Any, ...]]:
    """Yields (start, float64 blocks [positions, vocab]) of logits [t, vocab]."""
    length, vocab = logits[0].shape
    step = max(1, _BLOCK // vocab)
    for start in range(0, length, step):
        yield start, *(np.asarray(each[start : start + step], np.float64) for each in logits)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    p = np.exp(log_p)
    return np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _losses(log_probs: np.ndarray, following: np.ndarray) -> np.ndarray:
    return -log_probs[np.arange(len(following)), following]


def _estimate(values: np.ndarray) -> Estimate:
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), spread / math.sqrt(len(values)))


def _perplexity(losses: np.ndarray) -> Estimate:
    loss = _estimate(losses)
    mean = math.exp(loss.mean) if loss.mean < _LARGEST_EXPONENT else math.inf
    return Estimate(mean, mean * loss.error)


def check_structure(graph: Graph, checked: Graph | None = None) -> None:
    """Raises PassError where a graph is not well formed.

    Its inputs need unique names; stored weights the shape and dtype of their inputs; arguments and outputs
    those of a forward or a step graph (see `Graph`); its equations must type-check.
    checked: a graph known to be well formed; arrays that both share are not looked at again.
    """
    names = [item.name for item in graph.inputs]
    if len(set(names)) != len(names):
        raise PassError(f"two inputs are called {next(n for n in names if names.count(n) > 1)!r}")
    _check_arrays(graph, checked)
    if graph.is_step:
        _check_step(graph)
    else:
        _check_forward(graph)
    try:
        check_jaxpr(graph.jaxpr)
    except JaxprTypeError as error:
        raise PassError(f"the program does not type-check: {error}") from error


def _check_arrays(graph: Graph, checked: Graph | None) -> None:
    known, stored = set(graph.weights), graph.weights.stored
    made = {target for recipe in graph.weights.recipes for target in recipe.targets}
    shared = checked is not None and checked.weights.stored is stored
    seen = set(checked.names("weight", "const")) if checked is not None and shared else set()
    for name in graph.names("weight", "const"):
        if name not in known:
            raise PassError(f"there is no array for the input {name!r}")
        if name in stored and name not in seen | made:
            _check_array(name, stored[name], graph.aval(name))


def _check_array(name: str, array: Any, aval: Any) -> None:
    if np.shape(array) != aval.shape or jnp.result_type(array) != aval.dtype:
        found = f"{jnp.result_type(array).name}{list(np.shape(array))}"
        raise PassError(f"the array {name!r} is {found}, the program takes {type_text(aval)}")


def _check_forward(graph: Graph) -> None:
    if "tokens" not in graph.names("arg"):
        raise PassError(f"a forward graph has the argument tokens, this one has {graph.names('arg')}")
    tokens, outputs = graph.aval("tokens"), [v.aval for v in graph.jaxpr.outvars]
    for name in graph.names("arg"):
        if (aval := graph.aval(name)).shape != tokens.shape or aval.dtype != tokens.dtype:
            raise PassError(f"{name} must be as tokens are, {type_text(tokens)}, it is {type_text(aval)}")
    shapes = [tuple(o.shape) for o in outputs]
    if tokens.ndim != 2 or tokens.dtype != jnp.int32:
        raise PassError(f"tokens must be int32[b, t], they are {type_text(tokens)}")
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][:2] != tuple(tokens.shape):
        raise PassError(f"a forward graph returns logits [b, t, vocab]; this one returns {_types(outputs)}")


def _check_step(graph: Graph) -> None:
    if graph.names("arg") != ARGUMENTS:
        raise PassError(f"a step graph has the arguments {ARGUMENTS}, this one has {graph.names('arg')}")
    avals = [graph.aval(name) for name in ARGUMENTS]
    flat = all(a.ndim == 1 and a.dtype == jnp.int32 for a in avals)
    if not flat or len({a.shape for a in avals[:3]}) != 1:
        raise PassError(f"the arguments of a step graph are int32 [n], [n], [n] and [m], not {_types(avals)}")
    logits, *states = [v.aval for v in graph.jaxpr.outvars]
    if logits.ndim != 2 or logits.shape[0] != avals[3].shape[0]:
        raise PassError(f"a step graph returns logits [m, vocab] first, this one {type_text(logits)}")
    expected = [graph.aval(name) for name in graph.names("state")]
    if [(s.shape, s.dtype) for s in states] != [(s.shape, s.dtype) for s in expected]:
        raise PassError(
            f"a step graph returns its new states: expected {_types(expected)}, found {_types(states)}"
        )


def _types(avals: Sequence[Any]) -> str:
    return ", ".join(map(type_text, avals))
