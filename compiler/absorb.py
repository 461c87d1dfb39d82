"""Move the projections of a narrow latent out of attention, so that the latent is what a cache has to hold.

Where keys are W_k c and values W_v c of one latent c a token, with a W_k and a W_v for each head,

    q . (W_k c) = (W_k^T q) . c    and    sum_s p_s (W_v c_s) = W_v (sum_s p_s c_s),

so that all heads share one key and one value (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1.2). Keys may
have more features that all heads share already, such as a rotary part.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlathe import jaxpr as ir
from xlathe.audit import layouts_of
from xlathe.axes import Einsum
from xlathe.graph import Graph, Recipe
from xlathe.layouts import Layout
from xlathe.movement import MOVES, by_token, find_origins, holds_tokens
from xlathe.ops.attention import attention
from xlathe.rewrite import Replacement, rewrite_graph
from xlathe.validate import deviation, tolerance

WORTH = 2  # the cache has to shrink by more than this, since each head then multiplies with the whole latent
SAMPLED = {"b": 2, "t": 3}  # sizes at which a replacement is run beside what it replaces


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """A product of a latent with a weight, and the features of keys or values that come from it.

    product: latent [.., r] times weight; side: which operand is the latent. name: of the weight's input; views: the
    equations between it and the product, None where the weight is quantized. columns: int [heads, features], which of
    the product's features each is. features: int [features], where in a key or value they stand.
    """

    product: ir.JaxprEqn
    side: int
    name: str
    views: tuple[ir.JaxprEqn, ...] | None
    columns: np.ndarray
    features: np.ndarray

    @property
    def latent(self) -> ir.Var:
        return self.product.invars[self.side]

    @property
    def summed(self) -> list[tuple[int, int]]:
        """The summed axes of latent and weight, in the latent's order."""
        if self.views is None:
            return [(self.latent.aval.ndim - 1, 1)]
        pairs = Einsum.of(self.product).contracted
        return sorted((pair[self.side], pair[1 - self.side]) for pair in pairs)

    @property
    def width(self) -> int:
        """r."""
        return int(np.prod([self.latent.aval.shape[i] for i, _ in self.summed]))

    def equals(self, other: "Projection") -> bool:
        """Whether both make the same of the same view of a weight."""
        views = self.product.invars[1 - self.side], other.product.invars[1 - other.side]
        return views[0] is views[1] and self.summed == other.summed and np.array_equal(self.columns, other.columns)

    def part(self, weight: Any) -> jax.Array:
        """Returns what each head multiplies the latent with, [heads, features, r]."""
        assert self.views is not None
        for eqn in self.views:
            (weight,) = ir.bind(eqn, [weight])
        over = [i for _, i in self.summed]
        free = [i for i in range(weight.ndim) if i not in over]
        return jnp.transpose(weight, (*free, *over)).reshape(-1, self.width)[self.columns]


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """Keys or values [b, s, heads, size] of an attention.

    shared: what all heads have in common: a value, which of its features, and where in a key or value they stand.
    """

    dtype: Any
    projection: Projection | None
    shared: tuple[tuple[ir.Var, np.ndarray, np.ndarray], ...]

    @property
    def sources(self) -> tuple[ir.Var, ...]:
        """The latent, if there is one, and what is shared."""
        latent = (self.projection.latent,) if self.projection else ()
        return (*latent, *(value for value, *_ in self.shared))

    @property
    def width(self) -> int:
        """Numbers a token, for all heads together, with the projection moved out."""
        return (self.projection.width if self.projection else 0) + sum(len(index) for _, index, _ in self.shared)

    @property
    def order(self) -> np.ndarray:
        """Where the features stand in a key or value, the projected ones first."""
        own = [self.projection.features] if self.projection else []
        return np.concatenate([*own, *(features for *_, features in self.shared)])


@dataclasses.dataclass(frozen=True, eq=False)
class Absorption:
    """An attention whose keys and values can be narrower."""

    eqn: ir.JaxprEqn
    keys: Side
    values: Side

    @property
    def one_latent(self) -> bool:
        """Whether the values are what the keys begin with."""
        k, v = self.keys.projection, self.values.projection
        return k is not None and v is not None and k.latent is v.latent and not self.values.shared

    @property
    def bytes(self) -> tuple[int, int]:
        """What is remembered of a token, before and after."""
        k, v = (a.aval for a in self.eqn.invars[1:3])
        before = (k.shape[2] * k.shape[3] * k.dtype.itemsize, v.shape[2] * v.shape[3] * v.dtype.itemsize)
        own = 0 if self.one_latent else self.values.width
        return sum(before), self.keys.width * k.dtype.itemsize + own * v.dtype.itemsize

    @property
    def projections(self) -> dict[str, Projection]:
        """Those of keys and of values, which become weights of their own."""
        sides = {"keys": self.keys.projection, "values": self.values.projection}
        return {kind: p for kind, p in sides.items() if p is not None}


def absorb_projections(graph: Graph) -> tuple[Graph, tuple[str, ...], tuple[str, ...]]:
    """Rewrites every attention of a forward graph whose cache shrinks by it.

    A weight `w` gives way to `w.keys` and `w.values`, [heads, features, r], which a recipe makes. Returns also what was
    done and what nearly was, in lines.
    """
    finder = _Finder(graph)
    parts: dict[str, Projection] = {}
    replacements, notes, misses = {}, [], []
    for eqn in graph.jaxpr.eqns:
        found = finder.absorption(eqn) if ir.is_op(eqn, "attention") else None
        if found is None:
            continue
        before, after = found.bytes
        reason = finder.reason_against(found)
        if reason:
            misses.append(f"{before} bytes a token where {after} would do, of a latent: {reason}")
            continue
        notes.append(f"{after} bytes a token in place of {before}: the projections of a latent are absorbed")
        own = finder.named(found, parts)
        parts |= own
        replacements[eqn.outvars[0]] = finder.replacement(found, tuple(own))
    if replacements:
        graph = _replaced(graph, replacements, parts)
    return graph, tuple(dict.fromkeys(notes)), tuple(dict.fromkeys(misses))


def _replaced(graph: Graph, replacements: Mapping[ir.Var, Replacement], parts: Mapping[str, Projection]) -> Graph:
    made = {name: jax.eval_shape(part.part, graph.aval(part.name)) for name, part in parts.items()}
    rewritten = rewrite_graph(graph, replacements, made)
    left, recipes = rewritten.names("weight"), []
    for source in dict.fromkeys(part.name for part in parts.values()):
        own = {name: part for name, part in parts.items() if part.name == source}
        still = (source,) if source in left else ()
        recipes.append(Recipe(source, (*still, *own), _Parts(tuple(own.values()), bool(still))))
    return rewritten.replace(weights=graph.weights.derive(*recipes))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The recipe: a weight to its parts, itself before them if it is used elsewhere."""

    projections: tuple[Projection, ...]
    kept: bool

    def __call__(self, weight: Any) -> tuple[Any, ...]:
        return (*([weight] if self.kept else []), *(np.asarray(p.part(jnp.asarray(weight))) for p in self.projections))


class _Finder:
    """Finds what can be absorbed in one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producer = ir.producers(graph.jaxpr.eqns)
        named = zip(graph.jaxpr.invars, graph.inputs, strict=True)
        self.weights = {v: i.name for v, i in named if i.kind == "weight"}

    @functools.cached_property
    def layouts(self) -> Mapping[ir.Var, Layout]:
        return layouts_of(self.graph)

    def absorption(self, eqn: ir.JaxprEqn) -> Absorption | None:
        """Returns how the keys and values of an attention become narrower, if they do by enough."""
        keys, values = (self._side(a) for a in eqn.invars[1:3])
        if keys is None or values is None or not (keys.projection or values.projection):
            return None
        found = Absorption(eqn, keys, values)
        before, after = found.bytes
        return found if WORTH * after < before else None

    def _side(self, operand: ir.Atom) -> Side | None:
        """Reads keys or values as features that are projected and features that all heads share."""
        assert isinstance(operand, ir.Var)
        origins = find_origins(operand, self.producer)
        which, index = origins.which[0, 0], origins.index[0, 0]  # [heads, size]
        projection, shared = None, []
        for number, source in enumerate(origins.sources):
            here = which == number
            features = np.flatnonzero(here[0])
            columns = index[:, features]
            if not (here == here[0]).all() or not holds_tokens(self.layouts[source]):
                return None
            if (columns == columns[0]).all():
                shared += [(source, columns[0], features)] if features.size else []
            elif projection is None:
                projection = self._projection(source, columns, features)
                if projection is None:
                    return None
            else:
                return None
        return None if (which < 0).any() else Side(operand.aval.dtype, projection, tuple(shared))

    def _projection(self, source: ir.Var, columns: np.ndarray, features: np.ndarray) -> Projection | None:
        eqn = self.producer.get(source)
        if eqn is not None and ir.is_op(eqn, "quantized_dot"):
            return Projection(eqn, 0, self.weights.get(eqn.invars[1], ""), None, columns, features)
        if eqn is None or eqn.primitive.name != "dot_general":
            return None
        for side, (latent, weight) in enumerate((eqn.invars, eqn.invars[::-1])):
            views = self._views(weight)
            if views is None or not isinstance(latent, ir.Var) or not holds_tokens(self.layouts[latent]):
                continue
            name, path = views
            found = Projection(eqn, side, name, path, columns, features)
            summed = {i for i, _ in found.summed}
            apart = all((i in summed) == all(isinstance(f, int) for f in axis) for i, axis in
                        enumerate(self.layouts[latent].axes) if axis)  # fmt: skip
            if apart:
                return found
        return None

    def _views(self, atom: ir.Atom) -> tuple[str, tuple[ir.JaxprEqn, ...]] | None:
        """Returns the weight that a value is a view of, and the equations from it to the value."""
        path: list[ir.JaxprEqn] = []
        while isinstance(atom, ir.Var) and atom not in self.weights:
            eqn = self.producer.get(atom)
            if eqn is None or eqn.primitive.name not in MOVES | {"convert_element_type"} or len(eqn.outvars) > 1:
                return None
            path.insert(0, eqn)
            (atom,) = eqn.invars if len(eqn.invars) == 1 else (None,)
        return (self.weights[atom], tuple(path)) if isinstance(atom, ir.Var) else None

    def reason_against(self, found: Absorption) -> str | None:
        """Returns why an attention stays as it is."""
        for part in found.projections.values():
            if part.views is None:
                return f"{part.name} is quantized; derive the cache first (KVCache before Quantize)"
        return None if self.is_exact(found) else "it gives other numbers"

    def named(self, found: Absorption, parts: Mapping[str, Projection]) -> dict[str, Projection]:
        """Names the new weights: a name of `parts` where it is the same one, else a name that nothing has yet."""
        used = {i.name for i in self.graph.inputs}
        result: dict[str, Projection] = {}
        for kind, part in found.projections.items():
            names = (f"{part.name}.{kind}{f'.{i}' if i else ''}" for i in itertools.count())
            result[next(n for n in names if n not in used and (n not in parts or part.equals(parts[n])))] = part
        return result

    def replacement(self, found: Absorption, names: tuple[str, ...]) -> Replacement:
        emitter = _Emitter(found, self.layouts)
        return Replacement(emitter.inputs, emitter.emit, found.eqn, names)

    def is_exact(self, found: Absorption) -> bool:
        """Runs the replacement beside the attention, on random numbers."""
        emitter = _Emitter(found, self.layouts)
        weights = {name: var for var, name in self.weights.items()}
        read = tuple(weights[part.name] for part in found.projections.values())
        count = len(emitter.inputs)

        def emit(*operands: Any) -> jax.Array:
            parts = zip(found.projections.values(), operands[count:], strict=True)
            return emitter.emit(*operands[:count], *(p.part(jnp.asarray(weight)) for p, weight in parts))

        replacement = Replacement((*emitter.inputs, *read), emit)
        samples = _samples(replacement.inputs)
        error = deviation(self.graph.jaxpr, found.eqn.outvars[0], replacement, samples, SAMPLED)
        return error <= tolerance(str(v.aval.dtype) for v in samples if v.aval.dtype != bool)


def _samples(values: tuple[ir.Var, ...]) -> dict[ir.Var, np.ndarray]:
    """Random operands; a mask leaves every query its first key."""
    random = np.random.default_rng(0)
    samples = {}
    for var in values:
        shape = ir.substitute(tuple(var.aval.shape), SAMPLED)
        if var.aval.dtype == bool:
            samples[var] = random.random(shape) < 0.6
            samples[var][..., 0] = True
        else:
            scale = (np.prod(shape) / np.sqrt(shape[-1])) ** -0.5 if var.aval.ndim == 2 else 1.0
            samples[var] = (random.normal(size=shape) * scale).astype(var.aval.dtype)
    return samples


@dataclasses.dataclass(frozen=True, eq=False)
class _Emitter:
    """Traces the narrower attention in the place of the other."""

    found: Absorption
    layouts: Mapping[ir.Var, Layout]

    @property
    def inputs(self) -> tuple[ir.Var, ...]:
        """Queries, what keys and values are made from, mask and bias; the parts of weights come after them."""
        sides = (self.found.keys,) if self.found.one_latent else (self.found.keys, self.found.values)
        q, terms = self.found.eqn.invars[0], self.found.eqn.invars[3:]
        return (q, *(value for side in sides for value in side.sources), *terms)

    def emit(self, q: jax.Array, *more: jax.Array) -> jax.Array:
        """Takes the values of `inputs`, then the parts of the weights, each in turn by who reads it."""
        left = iter(more)
        keys = self._narrow(self.found.keys, left, q)
        if self.found.one_latent:
            values = lax.slice_in_dim(keys, 0, self.found.values.width, axis=-1)
        else:
            values = self._narrow(self.found.values, left, q)
        terms = [_one_head(next(left), *q.shape[2:4]) for _ in self.found.eqn.invars[3:]]
        out = attention(self._queries(q, left), keys, values, *terms, **ir.attributes(self.found.eqn))
        return self._outputs(out.reshape(*q.shape[:4], out.shape[-1]), left)

    def _narrow(self, side: Side, left: Iterator[jax.Array], q: jax.Array) -> jax.Array:
        """Returns the key or value that all heads share, [b, s, 1, width]."""
        sources = [by_token(next(left), self.layouts[v], *q.shape[:2]) for v in side.sources]
        latent = sources[:1] if side.projection else []
        shared = zip(sources[len(latent) :], side.shared, strict=True)
        pieces = [*latent, *(_pick(value, index) for value, (_, index, _) in shared)]
        return jnp.concatenate([piece.astype(side.dtype) for piece in pieces], axis=-1)[:, :, None]

    def _queries(self, q: jax.Array, left: Iterator[jax.Array]) -> jax.Array:
        """Returns [b, t, 1, heads * groups, width]."""
        side = self.found.keys
        rest = _pick(q, side.order[len(side.projection.features) :] if side.projection else side.order)
        if side.projection:
            own = _pick(q, side.projection.features)
            own = _product("btkgd,kdr->btkgr", own, next(left))
            rest = jnp.concatenate([own.astype(q.dtype), rest], axis=-1)
        return rest.reshape(*q.shape[:2], 1, -1, side.width)

    def _outputs(self, out: jax.Array, left: Iterator[jax.Array]) -> jax.Array:
        """Projects the values that were summed, [b, t, heads, groups, width], and puts features in their order."""
        side = self.found.values
        if side.projection:
            own, rest = out[..., : side.projection.width], out[..., side.projection.width :]
            own = _product("btkgr,ker->btkge", own, next(left))
            out = jnp.concatenate([own.astype(out.dtype), rest], axis=-1)
        return _pick(out, np.argsort(side.order))


def _one_head(term: jax.Array, heads: int, groups: int) -> jax.Array:
    """Arranges a mask or bias [b, k, g, t, s] for one key-value head that all query heads share."""
    b, k, g, t, s = term.shape
    if k == g == 1:
        return term
    return jnp.broadcast_to(term, (b, heads, groups, t, s)).reshape(b, 1, heads * groups, t, s)


def _product(axes: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """In float32, whatever the operands are in: what was one sum of products is now two."""
    return jnp.einsum(axes, x.astype(jnp.float32), weight.astype(jnp.float32))


def _pick(x: jax.Array, index: np.ndarray) -> jax.Array:
    """Takes features, by slices of those that lie beside each other: an array of numbers would be captured."""
    if np.array_equal(index, np.arange(x.shape[-1])):
        return x
    runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
    pieces = [lax.slice_in_dim(x, int(run[0]), int(run[-1]) + 1, axis=-1) for run in runs if run.size]
    return jnp.concatenate(pieces, axis=-1) if pieces else x[..., :0]
