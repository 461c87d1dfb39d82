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
from xlathe.passes.merge.combine import combine, gram
from xlathe.passes.merge.scope import Kept

REQUIRED = object()
"""In the place of a default, where there is none."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors of one name, of one shape.

    tensors: of the models in their order, but for the base; base: its tensor, None where the method has none. each: a
    value a model, shared: one value, by the names of parameters. key: of what is drawn by chance, this tensor's own.
    kept: what ranks keep of each model's changes, where there are any. start: the place of the tensors' first number,
    where they are blocks.
    """

    tensors: Sequence[jax.Array]
    base: jax.Array | None
    each: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any]
    key: jax.Array
    kept: Sequence[Kept] | None = None
    start: int = 0

    @property
    def weights(self) -> list[float]:
        return [float(weight) for weight in self.each["weight"]]

    @functools.cached_property
    def deltas(self) -> list[jax.Array]:
        assert self.base is not None
        return [tasks.change(tensor, self.base) for tensor in self.tensors]

    def onto_base(self, delta: jax.Array) -> jax.Array:
        assert self.base is not None
        return combine([self.base, delta], [1, float(self.shared.get("lambda", 1))])


@dataclasses.dataclass(frozen=True)
class Method:
    """merge: of a group, float32. each, shared: parameters and their defaults. base: whether there must be one.
    count: the fewest and the most models beside the base. blocks: whether a number of the result depends on those of
    its place alone, beside what `Group.kept` says, so that a tensor may be merged in parts."""

    merge: Callable[[Group], jax.Array]
    each: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Literal["none", "needed", "optional"] = "none"
    count: tuple[int, int] = (1, 1 << 20)
    blocks: bool = False


def _normalized(weights: Sequence[float]) -> np.ndarray:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise PassError(f"the weights {', '.join(f'{w:g}' for w in weights)} have the sum 0, by which they are divided")
    return np.asarray(weights, np.float64) / total


def _linear(group: Group) -> jax.Array:
    return combine(group.tensors, _normalized(group.weights) if group.shared["normalize"] else group.weights)


def _slerp(group: Group) -> jax.Array:
    assert group.base is not None
    pair = [group.base, *group.tensors]
    return combine(pair, spheres.slerp(gram(pair), float(group.shared["t"])))


def _nuslerp(group: Group) -> jax.Array:
    vectors = group.tensors if group.base is None else group.deltas
    t, flat = float(_normalized(group.weights)[1]), group.shared["nuslerp_flatten"] or vectors[0].ndim < 2
    turned = not flat and not group.shared["nuslerp_row_wise"]
    if turned:
        vectors = [jnp.swapaxes(v, 0, 1) for v in vectors]
    merged = combine(vectors, spheres.slerp(gram(vectors, rows=not flat), t))
    merged = jnp.swapaxes(merged, 0, 1) if turned else merged
    return merged if group.base is None else group.onto_base(merged)


def _on_sphere(group: Group, weights: Sequence[float], **options: Any) -> jax.Array:
    vectors = group.tensors if group.base is None else group.deltas
    merged = combine(vectors, spheres.karcher(gram(vectors), _normalized(weights), **options))
    return merged if group.base is None else group.onto_base(merged)


def _multislerp(group: Group) -> jax.Array:
    return _on_sphere(group, group.weights, steps=1)


def _karcher(group: Group) -> jax.Array:
    steps, tolerance = int(group.shared["max_iter"]), float(group.shared["tol"])
    return _on_sphere(group, [1.0] * len(group.tensors), steps=steps, tolerance=tolerance)


def _in_band(delta: jax.Array, kept: Kept, start: int) -> jax.Array:
    return jnp.where(masks.marks(delta, kept.band, start), delta, 0) * kept.factor


def _task(group: Group, keep: Callable[..., jax.Array] | None, *, elect: bool) -> jax.Array:
    """Drops numbers of each change, by ranks or by chance, and adds what is left to the base."""
    deltas = group.deltas
    if group.kept is not None:
        deltas = [_in_band(delta, kept, group.start) for delta, kept in zip(deltas, group.kept, strict=True)]
    if keep is not None:
        options = {"epsilon": float(group.shared["epsilon"])} if "epsilon" in group.shared else {}
        options |= {"rescale": group.shared["rescale"]}
        keys = [jax.random.fold_in(group.key, i) for i in range(len(deltas))]
        densities = map(float, group.each["density"])
        deltas = [keep(*given, density=p, **options) for *given, p in zip(keys, deltas, densities, strict=True)]
    add, normalize = tasks.elected if elect else tasks.summed, bool(group.shared["normalize"])
    if normalize and not elect:
        _normalized(group.weights)
    return group.onto_base(add(deltas, group.weights, normalize=normalize))


def _sce(group: Group) -> jax.Array:
    return group.onto_base(tasks.sce(group.deltas, select=float(group.shared["select_topk"])))


def _model_stock(group: Group) -> jax.Array:
    rows = bool(group.shared["filter_wise"]) and group.deltas[0].ndim > 1
    return group.onto_base(combine(group.deltas, spheres.model_stock(gram(group.deltas, rows=rows))))


def _nearswap(group: Group) -> jax.Array:
    assert group.base is not None
    if group.shared["t"] < 0:
        raise PassError(f"t={group.shared['t']}: expected a distance, at least 0")
    return tasks.nearswap(group.base, group.tensors[0], float(group.shared["t"]))


def _passthrough(group: Group) -> jax.Array:
    return combine(group.tensors, [float(group.each["scale"][0])])


WEIGHT, DENSITY = {"weight": REQUIRED}, {"density": 1.0}
TASK = {"lambda": 1.0, "normalize": False}
_KEEP_PROB, _RANKED = {"rescale": "keep_prob"}, {"rescale": "none", "scope": "tensor"}


def _sum_of(keep: Any, elect: bool) -> Callable[[Group], jax.Array]:
    return functools.partial(_task, keep=keep, elect=elect)


METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, WEIGHT, {"normalize": True}, blocks=True),
    "slerp": Method(_slerp, {}, {"t": REQUIRED}, "needed", (1, 1)),
    "nuslerp": Method(_nuslerp, WEIGHT, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, "optional", (2, 2)),
    "multislerp": Method(_multislerp, WEIGHT, {}, "optional"),
    "karcher": Method(_karcher, {}, {"max_iter": 100, "tol": 1e-9}, "optional"),
    "task_arithmetic": Method(_sum_of(None, False), WEIGHT, TASK, "needed", blocks=True),
    "ties": Method(_sum_of(None, True), WEIGHT | DENSITY, TASK | _RANKED | {"normalize": True}, "needed", blocks=True),
    "dare_linear": Method(_sum_of(masks.by_chance, False), WEIGHT | DENSITY, TASK | _KEEP_PROB, "needed"),
    "dare_ties": Method(_sum_of(masks.by_chance, True), WEIGHT | DENSITY, TASK | _KEEP_PROB, "needed"),
    "breadcrumbs": Method(
        _sum_of(None, False), WEIGHT | DENSITY, TASK | _RANKED | {"gamma": 0.01}, "needed", blocks=True
    ),
    "breadcrumbs_ties": Method(
        _sum_of(None, True), WEIGHT | DENSITY, TASK | _RANKED | {"gamma": 0.01}, "needed", blocks=True
    ),
    "della_linear": Method(
        _sum_of(masks.by_chance_and_size, False),
        WEIGHT | {"density": 0.7},
        TASK | _KEEP_PROB | {"epsilon": 0.15},
        "needed",
    ),
    "della": Method(
        _sum_of(masks.by_chance_and_size, True),
        WEIGHT | {"density": 0.7},
        TASK | _KEEP_PROB | {"epsilon": 0.15, "normalize": True},
        "needed",
    ),
    "sce": Method(_sce, {}, {"select_topk": 1.0}, "needed"),
    "model_stock": Method(_model_stock, {}, {"filter_wise": False}, "needed", (2, 1 << 20)),
    "nearswap": Method(_nearswap, {}, {"t": REQUIRED}, "needed", (1, 1), blocks=True),
    "passthrough": Method(_passthrough, {"scale": 1.0}, {}, "none", (1, 1), blocks=True),
}
"""By their names in mergekit's recipes, whose parameters they take; `passes/merge/README.md` says where they differ."""

SCOPES = ("tensor", "model")
_FLAGS = ("normalize", "nuslerp_flatten", "nuslerp_row_wise", "filter_wise")
_RESCALES = {True: "l1", False: "none"} | {name: name for name in ("none", "keep_prob", "l1")}


def check_value(name: str, value: Any, others: Mapping[str, Any]) -> Any:
    """Returns a parameter's value as methods take it; OptionError for what cannot be one.

    others: the other values of the same tensor, as far as they are known.
    """
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise OptionError(f"{name}: expected a number, found {value!r}")
    if name in ("density", "select_topk") and not 0 < value <= 1:
        raise OptionError(f"{name}={value}: expected a share, above 0 and at most 1")
    if name == "gamma" and not 0 <= value < 1:
        raise OptionError(f"gamma={value}: expected a share, at least 0 and below 1")
    if name in ("epsilon", "tol") and value < 0:
        raise OptionError(f"{name}={value}: expected at least 0")
    if name == "max_iter" and (value != int(value) or value < 1):
        raise OptionError(f"max_iter={value}: expected a whole number of at least 1")
    if name == "density" and "epsilon" in others:
        low, high = value - others["epsilon"], value + others["epsilon"]
        if low <= 0 or high > 1:
            raise OptionError(f"density={value}, epsilon={others['epsilon']}: {low:g} to {high:g} are no chances")
    return value
