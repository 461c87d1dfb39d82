"""The methods by the names that recipes give them: their parameters, and what they make of the tensors of one name."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError, PassError
from xlathe.passes.merge import masks, spheres, tasks
from xlathe.passes.merge.combine import add, combine, gram
from xlathe.passes.merge.group import Group, Tensors
from xlathe.passes.merge.ranks import Band, find_whole_band
from xlathe.passes.merge.scope import Kept

REQUIRED = object()
"""In the place of a default, where there is none."""


@dataclasses.dataclass(frozen=True)
class Method:
    """merge: of a group, float32. each, shared: parameters and their defaults. base: whether there must be one.
    count: the fewest and the most models beside the base. measure: what `merge` has to know of the whole tensors,
    beside what `Group.kept` says. check: raises PassError where parameters have no result,
    whatever the tensors hold."""

    merge: Callable[[Group], jax.Array]
    each: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Literal["none", "needed", "optional"] = "none"
    count: tuple[int, int] = (1, 1 << 20)
    measure: Callable[[Tensors], Any] | None = None
    check: Callable[[Mapping[str, Sequence[Any]], Mapping[str, Any]], None] = lambda each, shared: None


def _normalized(weights: Sequence[float]) -> np.ndarray:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise PassError(f"the weights {', '.join(f'{w:g}' for w in weights)} have the sum 0, by which they are divided")
    return np.asarray(weights, np.float64) / total


def _check_mean(each: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> None:
    if shared.get("normalize", True):
        _normalized(each["weight"])


def _check_task(elect: bool, each: Mapping[str, Sequence[Any]], shared: Mapping[str, Any]) -> None:
    """Sums of elected changes are divided by a sum of magnitudes."""
    if shared["normalize"]:
        _normalized([abs(weight) if elect else weight for weight in each["weight"]])
    for density, epsilon in zip(each.get("density", ()), each.get("epsilon", ()), strict=False):
        low, high = density - epsilon, density + epsilon
        if low <= 0 or high > 1:
            raise PassError(f"density={density}, epsilon={epsilon}: {low:g} to {high:g} are no chances")


def _linear(group: Group) -> jax.Array:
    return combine(group.tensors, _normalized(group.weights) if group.shared["normalize"] else group.weights)


def _found_combined(group: Group) -> jax.Array:
    """The sum of all tensors, each times the coefficient that was measured."""
    return combine(group.all, group.found)


def _products(whole: Tensors, of: Callable[[Group], np.ndarray]) -> np.ndarray:
    """Returns inner products over all blocks; 0 for tensors of one number, which have no direction to turn."""
    found = add(of(group) for group in whole.read())
    return np.zeros_like(found) if whole.size == 1 else found


def _measure_slerp(whole: Tensors) -> np.ndarray:
    return spheres.slerp(_products(whole, lambda group: gram(group.all)), float(whole.shared["t"]))


def _columns(vectors: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.swapaxes(vector, 0, 1) for vector in vectors]


def _measure_nuslerp(whole: Tensors) -> np.ndarray | None:
    t = float(_normalized(whole.each["weight"])[1])
    if whole.shared["nuslerp_flatten"] or not whole.is_matrix or whole.size == 1:
        return spheres.slerp(_products(whole, lambda group: gram(group.vectors)), t)
    if whole.shared["nuslerp_row_wise"]:
        return None  # a row is whole in its block
    return spheres.slerp(_products(whole, lambda group: gram(_columns(group.vectors), rows=True)), t)


def _nuslerp(group: Group) -> jax.Array:
    vectors, t = group.vectors, float(_normalized(group.weights)[1])
    if group.found is None:
        merged = combine(vectors, spheres.slerp(gram(vectors, rows=True), t))
    elif group.found.ndim > 1:
        merged = jnp.swapaxes(combine(_columns(vectors), group.found), 0, 1)
    else:
        merged = combine(vectors, group.found)
    return merged if group.base is None else group.onto_base(merged)


def _measure_sphere(weights: Sequence[float], whole: Tensors, **options: Any) -> np.ndarray:
    products = _products(whole, lambda group: gram(group.vectors))
    return spheres.karcher(products, _normalized(weights), **options)


def _measure_multislerp(whole: Tensors) -> np.ndarray:
    return _measure_sphere(whole.each["weight"], whole, steps=1)


def _measure_karcher(whole: Tensors) -> np.ndarray:
    steps, tolerance = int(whole.shared["max_iter"]), float(whole.shared["tol"])
    return _measure_sphere([1.0] * whole.count, whole, steps=steps, tolerance=tolerance)


def _on_sphere(group: Group) -> jax.Array:
    merged = combine(group.vectors, group.found)
    return merged if group.base is None else group.onto_base(merged)


def _in_band(delta: jax.Array, kept: Kept, start: int) -> jax.Array:
    return jnp.where(masks.marks(delta, kept.band, start), delta, 0) * kept.factor


def _dropped(group: Group, drop: Callable[..., jax.Array], rescale: masks.Rescale) -> list[jax.Array]:
    """Returns what chance leaves of each change."""
    shares = {name: group.each[name] for name in ("density", "epsilon") if name in group.each}
    dropped = []
    for i, delta in enumerate(group.deltas):
        own = {name: float(values[i]) for name, values in shares.items()}
        dropped.append(drop(jax.random.fold_in(group.key, i), delta, rescale=rescale, row=group.row, **own))
    return dropped


def _measure_dropped(drop: Callable[..., jax.Array], whole: Tensors) -> np.ndarray | None:
    """Returns what restores each change's sum of magnitudes, 1 where nothing but zeros is left."""
    if whole.shared["rescale"] != "l1":
        return None
    sums = np.zeros((2, whole.count))
    for group in whole.read():
        for at, changes in enumerate((group.deltas, _dropped(group, drop, "none"))):
            sums[at] += [float(jnp.abs(change).sum()) for change in changes]
    return np.divide(sums[0], sums[1], out=np.ones(whole.count), where=sums[1] > 0)


def _task(group: Group, drop: Callable[..., jax.Array] | None, *, elect: bool) -> jax.Array:
    """Drops numbers of each change, by ranks or by chance, and adds what is left to the base."""
    deltas = group.deltas
    if group.kept is not None:
        deltas = [_in_band(delta, kept, group.start) for delta, kept in zip(deltas, group.kept, strict=True)]
    if drop is not None:
        deltas = _dropped(group, drop, group.shared["rescale"] if group.found is None else "none")
    if group.found is not None:
        deltas = [delta * float(factor) for delta, factor in zip(deltas, group.found, strict=True)]
    total, normalize = tasks.elected if elect else tasks.summed, bool(group.shared["normalize"])
    return group.onto_base(total(deltas, group.weights, normalize=normalize))


def _measure_sce(whole: Tensors) -> tuple[Band, np.ndarray]:
    """Returns which variances are chosen, and the weights of the models."""
    count = masks.kept_count(whole.size, float(whole.shared["select_topk"]))
    variances = lambda: (tasks.variance(group.deltas) for group in whole.read())  # noqa: E731
    band = find_whole_band(variances, 0, count) if count < whole.size else Band()
    energies = np.zeros(whole.count)
    for group in whole.read():
        energies += np.asarray(tasks.energies(group.deltas, _chosen(group, band)), np.float64)
    return band, tasks.shares(energies)


def _chosen(group: Group, band: Band) -> jax.Array:
    return masks.marks(tasks.variance(group.deltas), band, group.start)


def _sce(group: Group) -> jax.Array:
    band, weights = group.found
    return group.onto_base(tasks.weighed(group.deltas, _chosen(group, band), jnp.asarray(weights, jnp.float32)))


def _measure_model_stock(whole: Tensors) -> np.ndarray | None:
    if whole.shared["filter_wise"] and whole.is_matrix:
        return None  # a row is whole in its block
    return spheres.model_stock(add(gram(group.deltas) for group in whole.read()))


def _model_stock(group: Group) -> jax.Array:
    rows = group.found is None
    found = spheres.model_stock(gram(group.deltas, rows=True)) if rows else group.found
    return group.onto_base(combine(group.deltas, found))


def _nearswap(group: Group) -> jax.Array:
    assert group.base is not None
    if group.shared["t"] < 0:
        raise PassError(f"t={group.shared['t']}: expected a distance, at least 0")
    return tasks.nearswap(group.base, group.tensors[0], float(group.shared["t"]))


def _passthrough(group: Group) -> jax.Array:
    return combine(group.tensors, [float(group.each["scale"][0])])


WEIGHT, DENSITY, DELLA = {"weight": REQUIRED}, {"density": 1.0}, {"density": 0.7, "epsilon": 0.15}
VECTORS = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
TASK = {"lambda": 1.0, "normalize": False}
_KEEP_PROB, _RANKED = {"rescale": "keep_prob"}, {"rescale": "none", "scope": "tensor"}


def _ranked(elect: bool, each: Mapping[str, Any], shared: Mapping[str, Any]) -> Method:
    """A method that keeps numbers by their ranks."""
    merge, check = functools.partial(_task, drop=None, elect=elect), functools.partial(_check_task, elect)
    return Method(merge, {**WEIGHT, **DENSITY, **each}, {**TASK, **_RANKED, **shared}, "needed", check=check)


def _dropping(
    drop: Callable[..., jax.Array], elect: bool, each: Mapping[str, Any], shared: Mapping[str, Any]
) -> Method:
    """A method that keeps numbers by chance."""
    merge, measure = functools.partial(_task, drop=drop, elect=elect), functools.partial(_measure_dropped, drop)
    check = functools.partial(_check_task, elect)
    return Method(merge, {**WEIGHT, **each}, {**TASK, **_KEEP_PROB, **shared}, "needed", measure=measure, check=check)


METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, WEIGHT, {"normalize": True}, check=_check_mean),
    "slerp": Method(_found_combined, {}, {"t": REQUIRED}, "needed", (1, 1), _measure_slerp),
    "nuslerp": Method(_nuslerp, WEIGHT, VECTORS, "optional", (2, 2), _measure_nuslerp, _check_mean),
    "multislerp": Method(_on_sphere, WEIGHT, {}, "optional", measure=_measure_multislerp, check=_check_mean),
    "karcher": Method(_on_sphere, {}, {"max_iter": 100, "tol": 1e-9}, "optional", measure=_measure_karcher),
    "task_arithmetic": Method(
        functools.partial(_task, drop=None, elect=False),
        WEIGHT,
        TASK,
        "needed",
        check=functools.partial(_check_task, False),
    ),
    "ties": _ranked(True, {}, {"normalize": True}),
    "dare_linear": _dropping(masks.by_chance, False, DENSITY, {}),
    "dare_ties": _dropping(masks.by_chance, True, DENSITY, {}),
    "breadcrumbs": _ranked(False, {"gamma": 0.01}, {}),
    "breadcrumbs_ties": _ranked(True, {"gamma": 0.01}, {}),
    "della_linear": _dropping(masks.by_chance_and_size, False, DELLA, {}),
    "della": _dropping(masks.by_chance_and_size, True, DELLA, {"normalize": True}),
    "sce": Method(_sce, {}, {"select_topk": 1.0}, "needed", measure=_measure_sce),
    "model_stock": Method(_model_stock, {}, {"filter_wise": False}, "needed", (2, 1 << 20), _measure_model_stock),
    "nearswap": Method(_nearswap, {}, {"t": REQUIRED}, "needed", (1, 1)),
    "passthrough": Method(_passthrough, {"scale": 1.0}, {}, "none", (1, 1)),
}
"""By their names in mergekit's recipes, whose parameters they take; `passes/merge/README.md` says where they differ."""

SCOPES = ("tensor", "model")
_FLAGS = ("normalize", "nuslerp_flatten", "nuslerp_row_wise", "filter_wise")
_RESCALES = {True: "l1", False: "none"} | {name: name for name in ("none", "keep_prob", "l1")}


def check_value(name: str, value: Any) -> Any:
    """Returns a parameter's value as methods take it; OptionError for what cannot be one."""
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise OptionError(f"{name}: expected true or false, found {value!r}")
        return value
    if name == "rescale":
        if not isinstance(value, bool | str) or value not in _RESCALES:
            raise OptionError(f"rescale: expected one of {', '.join(map(str, _RESCALES))}, found {value!r}")
        return _RESCALES[value]
    if name == "scope":
        if value not in SCOPES:
            raise OptionError(f"scope: expected {' or '.join(SCOPES)}, found {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise OptionError(f"{name}: expected a number, found {value!r}")
    if name in ("density", "select_topk") and not 0 < value <= 1:
        raise OptionError(f"{name}={value}: expected a share, above 0 and at most 1")
    if name == "gamma" and not 0 <= value < 1:
        raise OptionError(f"gamma={value}: expected a share, at least 0 and below 1")
    if name in ("epsilon", "tol") and value < 0:
        raise OptionError(f"{name}={value}: expected at least 0")
    if name == "max_iter" and (value != int(value) or value < 1):
        raise OptionError(f"max_iter={value}: expected a whole number of at least 1")
    return value
