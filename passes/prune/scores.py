"""How much each index of a group matters: by its weights, by what it feeds on, by what the loss would change."""

from collections.abc import Mapping
from typing import Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.errors import OptionError, PassError
from xlathe.experts import is_of_softmax
from xlathe.passes.distill.losses import cross_entropy
from xlathe.passes.observe import check_calibration, find_products, observe
from xlathe.passes.prune.groups import Groups
from xlathe.passes.quantize.experts import find_experts
from xlathe.passes.quantize.uses import plan_weights
from xlathe.pipeline import Context

Score = Literal["weight", "weight_l1", "activation", "taylor"]
SCORES: Final = ("weight", "weight_l1", "activation", "taylor")
BY_WEIGHT: Final = ("weight", "weight_l1")


def score_groups(found: Groups, score: Score, context: Context) -> dict[int, np.ndarray]:
    """Returns one number an index by atom. Raises OptionError where calibration tokens are needed and missing,
    PassError where a number is not finite."""
    scores = _score(found, score, context)
    for atom, numbers in scores.items():
        if not np.isfinite(numbers).all():
            raise PassError(f"prune: scores of {found.kinds[atom]} are not finite: a weight or an activation is not")
    return scores


def _score(found: Groups, score: Score, context: Context) -> dict[int, np.ndarray]:
    if score in BY_WEIGHT:
        return weight_scores(found, 1 if score == "weight_l1" else 2)
    if not len(context.calibration):
        raise OptionError(
            f"score='{score}' needs calibration tokens: pipeline(graph, calibration=batches) or --calibration=FILE"
        )
    return taylor_scores(found, context) if score == "taylor" else activation_scores(found, context)


def weight_scores(found: Groups, order: int = 2) -> dict[int, np.ndarray]:
    """L1 or L2 norm over all elements of the weights that go with an index."""
    powers = {name: np.abs(np.asarray(found.graph.weights[name], np.float64)) ** order for name in _named(found)}
    return {atom: total ** (1 / order) for atom, total in _sums(found, powers).items()}


def activation_scores(found: Groups, context: Context) -> dict[int, np.ndarray]:
    """L2 norm over calibration tokens of what an index feeds to the weights that sum over it.

    Of a feature of the residual stream: the mean of its size over a text, L2 over texts, summed over the values that
    weights read, which are outputs of norms (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679).
    """
    stats = observe(found.graph, context.calibration, progress=context.progress).inputs
    names = list(found.graph.names("weight"))
    layouts, experts = plan_weights(found.graph, names)[0], find_experts(found.graph, dict.fromkeys(names))[0]
    layouts = {**layouts, **{name: group.layout for group in experts for name in group.names}}
    scores = {atom: np.zeros(int(found.dims.sizes[atom])) for atom in found.kinds}
    for name, seen in stats.items():
        labels = [found.label(name, axis) for axis in layouts[name].contracted]
        for atom in scores:
            if any(atom in found.dims.atoms(label) for label in labels):
                found.add(scores[atom], seen.sum_squares, labels, atom)
    scores = {atom: np.sqrt(total) for atom, total in scores.items()}
    scores |= {a: _stream_scores(found, a, context) for a, kind in found.kinds.items() if kind == "hidden"}
    scores |= _query_key_scores(found, context)
    return scores | _expert_scores(found, context)


def _query_key_scores(found: Groups, context: Context) -> dict[int, np.ndarray]:
    """L2 norm over calibration tokens of a channel's queries times that of its keys, L2 over heads.

    That is the Frobenius norm of what the channel adds to the scores of all pairs of tokens (Xu et al. 2024,
    https://arxiv.org/abs/2407.21018); rotation leaves it as it is for a pair of channels.
    """
    graph = found.graph
    attentions = [eqn for eqn in graph.jaxpr.eqns if ir.is_op(eqn, "attention")]
    scores = {a: np.zeros(int(found.dims.sizes[a])) for a, kind in found.kinds.items() if kind == "query_key_dims"}
    if not scores:
        return {}
    exposed = ir.expose(graph.jaxpr, [v for eqn in attentions for v in eqn.invars[:2] if isinstance(v, ir.Var)])

    @jax.jit
    def run(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        _, *values = graph.evaluate(exposed, arrays, batch)
        return [jnp.square(value.astype(jnp.float32)).sum((0, 1)) for value in values]  # q [k, g, d], k [k, d]

    batches = check_calibration(graph, context.calibration)
    sums = [[np.asarray(each, np.float64) for each in run(graph.arrays, batch)] for batch in batches]
    squares = [sum(each) for each in zip(*sums, strict=True)]
    for eqn, queries, keys in zip(attentions, squares[::2], squares[1::2], strict=True):
        channels = (np.sum(queries, axis=1) * keys).sum(0)
        label = found.coupling.values[eqn.invars[1]].labels[-1]
        for atom in scores:
            if atom in found.dims.atoms(label):
                found.add(scores[atom], channels, [label], atom)
    return {atom: np.sqrt(total) for atom, total in scores.items()}


def _stream_scores(found: Groups, atom: int, context: Context) -> np.ndarray:
    graph = found.graph
    places: dict[ir.Var, int] = {}
    for uses in find_products(graph, graph.names("weight")).plain.values():
        for var, summed in uses:
            labels = found.coupling.values[var].labels
            places.update((var, axis) for axis in summed if found.dims.resolve(labels[axis]) == (atom,))
    if not places:
        raise PassError(f"no weight reads the {found.dims.sizes[atom]} features of the residual stream")
    exposed = ir.expose(graph.jaxpr, list(places))

    @jax.jit
    def run(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        _, *values = graph.evaluate(exposed, arrays, batch)
        sizes = []
        for (var, axis), value in zip(places.items(), values, strict=True):
            texts = [i for i, n in enumerate(var.aval.shape) if ir.dim_vars(n) == {"b"}]
            others = tuple(i for i in range(value.ndim) if i != axis and i not in texts)
            mean = jnp.abs(value.astype(jnp.float32)).mean(others, keepdims=True)
            of_text = jnp.moveaxis(mean, axis, -1).reshape(-1, value.shape[axis])
            sizes.append(jnp.square(of_text).sum(0))
        return sizes

    batches = check_calibration(graph, context.calibration)
    squares = sum(np.asarray(run(graph.arrays, batch), np.float64) for batch in batches)
    total: np.ndarray = np.sqrt(squares).sum(0)
    return total


def _expert_scores(found: Groups, context: Context) -> dict[int, np.ndarray]:
    """L2 norm over calibration tokens of what experts give, times their probability where they are chosen by it."""
    graph = found.graph
    routings = {a: found.coupling.routings[a] for a, kind in found.kinds.items() if kind == "experts"}
    made = ir.producers(graph.jaxpr.eqns)
    probable = {a: is_of_softmax(each.choice, lambda v: made.get(v) if isinstance(v, ir.Var) else None)
                for a, each in routings.items()}  # fmt: skip
    values = [v for r in routings.values() for v in (r.products[-1].outvars[0], r.sizes, r.choice.outvars[0], r.order)]
    if not values:
        return {}
    exposed = ir.expose(graph.jaxpr, values)

    @jax.jit
    def run(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        _, *seen = graph.evaluate(exposed, arrays, batch)
        sums = []
        for i, is_probable in enumerate(probable.values()):
            rows, sizes, weights, order = seen[4 * i : 4 * i + 4]
            squares = jnp.square(rows.astype(jnp.float32)).sum(-1)
            if is_probable:
                squares *= jnp.square(weights.astype(jnp.float32).reshape(-1)[order])
            experts = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(rows))
            sums.append(jnp.zeros(len(sizes)).at[experts].add(squares))
        return sums

    batches = check_calibration(graph, context.calibration)
    found_sums = [[np.asarray(each, np.float64) for each in run(graph.arrays, batch)] for batch in batches]
    return {atom: np.sqrt(sum(sums)) for atom, *sums in zip(routings, *found_sums, strict=True)}


def taylor_scores(found: Groups, context: Context) -> dict[int, np.ndarray]:
    """What the loss of the next token would change by to first order: |sum w dL/dw| over an index's weights.

    Molchanov et al. 2019, https://arxiv.org/abs/1906.10771; the mean over batches, float64.
    """
    graph, names = found.graph, _named(found)

    @jax.jit
    def run(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        def loss(weights: Mapping[str, jax.Array]) -> jax.Array:
            logits = graph.logits({**arrays, **weights}, batch)
            return cross_entropy(logits[:, :-1], batch["tokens"][:, 1:]).mean()

        weights = {name: arrays[name] for name in names}
        return {name: weights[name] * slope for name, slope in jax.grad(loss)(weights).items()}

    batches = check_calibration(graph, context.calibration)
    if any(batch["tokens"].shape[1] < 2 for batch in batches):
        raise OptionError("score='taylor' needs rows of two calibration tokens or more: the loss is of the next token")
    scores = {atom: np.zeros(int(found.dims.sizes[atom])) for atom in found.kinds}
    for number, batch in enumerate(batches):
        changes = {name: np.asarray(array, np.float64) for name, array in run(graph.arrays, batch).items()}
        for atom, total in _sums(found, changes).items():
            scores[atom] += np.abs(total) / len(batches)
        context.progress("calibrating", (number + 1) / len(batches))
    return scores


def _named(found: Groups) -> list[str]:
    own = (name for atom in found.kinds for name in found.members(atom))
    return list(dict.fromkeys([*(name for atom in found.kinds for name, _ in found.axes[atom]), *own]))


def _sums(found: Groups, arrays: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Sums arrays, one a weight, over what goes with each index."""
    sums = {}
    for atom in found.kinds:
        sums[atom] = np.zeros(int(found.dims.sizes[atom]))
        for name, axis in found.axes[atom]:
            others = tuple(i for i in range(arrays[name].ndim) if i != axis)
            found.add(sums[atom], arrays[name].sum(axis=others), [found.label(name, axis)], atom)
        for name, number in found.members(atom).items():
            sums[atom][number] += arrays[name].sum()
    return sums
