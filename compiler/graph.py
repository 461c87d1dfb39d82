"""A graph is a JAX program and its weights."""

import dataclasses
import functools
import hashlib
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xlathe import jaxpr as ir
from xlathe.card import Card
from xlathe.errors import CheckpointError, OptionError, PassError, RequestError, XlatheError, as_path, did_you_mean

Kind = Literal["weight", "const", "arg", "state"]


@dataclasses.dataclass(frozen=True)
class Input:
    """One named input of a graph.

    kind: `weight` (trained), `const` (a mask or table whose value is known), `arg` (given at every call) or
    `state` (remembered between calls; the graph returns its new value).
    """

    name: str
    kind: Kind


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the inputs `targets` are made from the input `source` that they replace; a target may keep its name.

    make: a frozen, picklable-free callable from one array to a tuple with one array a target. more: further inputs
    that are replaced with the source, such as the experts beside it; `make` then takes an iterable of all arrays, each
    of which is made when it is asked for.
    """

    source: str
    targets: tuple[str, ...]
    make: Callable[[Any], tuple[Any, ...]]
    more: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """All inputs that are replaced."""
        return (self.source, *self.more)


@dataclasses.dataclass(frozen=True)
class Origin:
    """A trained array, and the weights that it is (itself alone) or was made into."""

    name: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]


def is_shape(array: Any) -> bool:
    """Says whether an array is but a shape, of which nothing can be computed."""
    return isinstance(array, jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Weights(Mapping[str, Any]):
    """Arrays by name, some of them made on demand by recipes.

    stored: the arrays of the original checkpoint, or as recipes made them before a graph was saved, in which case
    origins tell from what; recipes: applied lazily, the last result is not kept. A stored `jax.ShapeDtypeStruct` is a
    weight that has a shape and no value: whoever asks for the value gets an XlatheError.
    """

    stored: Mapping[str, Any]
    recipes: tuple[Recipe, ...] = ()
    origins: tuple[Origin, ...] = ()

    @functools.cached_property
    def _makers(self) -> dict[str, list[int]]:
        """The recipes that make a name, in order: one may replace an array by a smaller one of the same name."""
        makers: dict[str, list[int]] = {}
        for index, recipe in enumerate(self.recipes):
            for target in recipe.targets:
                makers.setdefault(target, []).append(index)
        return makers

    def __getitem__(self, name: str) -> Any:
        return self._value(name, len(self.recipes))

    def _value(self, name: str, before: int) -> Any:
        """Returns the array that a name stands for before a recipe is applied."""
        index = self._maker(name, before)
        if index is None:
            return self._stored(name)
        return self._made(index)[self.recipes[index].targets.index(name)]

    def _made(self, index: int) -> tuple[Any, ...]:
        """Returns what a recipe makes."""
        recipe = self.recipes[index]
        if recipe.more:
            return recipe.make(self._value(source, index) for source in recipe.sources)
        return recipe.make(self._value(recipe.source, index))

    def _stored(self, name: str) -> Any:
        if is_shape(array := self.stored[name]):
            raise XlatheError(
                f"{name} {array.dtype}{list(array.shape)} has a shape and no value: this graph was traced from shapes "
                "alone, and can be planned but not run or saved"
            )
        return array

    def _maker(self, name: str, before: int) -> int | None:
        return next((i for i in reversed(self._makers.get(name, [])) if i < before), None)

    def __iter__(self) -> Iterator[str]:
        names = dict.fromkeys(self.stored)
        for recipe in self.recipes:
            for source in recipe.sources:
                names.pop(source, None)
            names |= dict.fromkeys(recipe.targets)
        yield from names

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def derive(self, *recipes: Recipe) -> "Weights":
        """Returns the mapping after `recipes` replaced their sources."""
        return dataclasses.replace(self, recipes=(*self.recipes, *recipes))

    def trained(self, name: str, before: int | None = None) -> tuple[str, ...]:
        """Returns the names of the trained arrays that `name` is, or was made from."""
        index = self._maker(name, len(self.recipes) if before is None else before)
        if index is not None:
            return tuple(n for source in self.recipes[index].sources for n in self.trained(source, index))
        return tuple(origin.name for origin in self.origins if name in origin.targets) or (name,)

    def together(self, names: Iterable[str]) -> list[list[str]]:
        """Groups names: those that one recipe makes are in one group, which costs no more to prepare than one."""
        groups: dict[Any, list[str]] = {}
        for name in names:
            index = self._maker(name, len(self.recipes))
            groups.setdefault(name if index is None else index, []).append(name)
        return list(groups.values())

    def prepare(self, names: Iterator[str] | list[str]) -> dict[str, Any]:
        """Runs the recipes, one source at a time, and returns plain arrays for `names`."""
        wanted, made = list(dict.fromkeys(names)), {}
        for name in wanted:
            index = self._maker(name, len(self.recipes))
            if name in made:
                continue
            if index is None:
                made[name] = self._stored(name)
            else:
                made.update(zip(self.recipes[index].targets, self._made(index), strict=True))
        return {name: made[name] for name in wanted}


@dataclasses.dataclass(frozen=True)
class Record:
    """What one pass did: its text form, hits and near misses by rule, seconds and equations before and after.

    rewrites: what was rewritten, one line each in order, by a pass that can stop after any of them.
    """

    name: str
    hits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    misses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    equations: tuple[int, int] = (0, 0)
    rewrites: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A jaxpr with named inputs, and the weights they stand for.

    jaxpr: no captured constants; axes may be symbolic. A *forward* graph has the argument `tokens` [b, t], may have
        others of its shape (a padding mask), and returns logits [b, t, vocab]. A *step* graph (after the pass
        `kv_cache`) has the arguments `tokens` [n], `positions` [n], `rows` [n] and `select` [m], and one `state` input
        a remembered value; it returns logits [m, vocab] and the new states.
    inputs: one a `jaxpr.invars`, in order.
    weights: arrays by input name.
    max_len: the longest row of tokens that the graph may be used with.
    tokenizer: a `tokenizers.Tokenizer`, or None.
    history: what the passes did, oldest first.
    card: what the checkpoint said beside its weights, or None.
    """

    jaxpr: ir.Jaxpr
    inputs: tuple[Input, ...]
    weights: Weights
    max_len: int
    tokenizer: Any = None
    history: tuple[Record, ...] = ()
    card: Card | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.jaxpr.invars) or self.jaxpr.constvars:
            raise PassError(
                f"a graph needs one named input a jaxpr input and no captured constants; got {len(self.inputs)} names, "
                f"{len(self.jaxpr.invars)} inputs and {len(self.jaxpr.constvars)} constants"
            )

    def names(self, *kinds: Kind) -> tuple[str, ...]:
        """Returns the names of the inputs of these kinds, in order."""
        return tuple(i.name for i in self.inputs if i.kind in kinds)

    def aval(self, name: str) -> Any:
        """Returns shape and dtype of an input."""
        return next(v.aval for i, v in zip(self.inputs, self.jaxpr.invars, strict=True) if i.name == name)

    @property
    def is_step(self) -> bool:
        """Whether this is an incremental step on a flat list of tokens."""
        return "rows" in self.names("arg")

    @property
    def has_free_length(self) -> bool:
        """Whether the number of tokens is symbolic still."""
        return any(ir.is_symbolic(dim) for dim in self.aval("tokens").shape)

    @property
    def vocab(self) -> int:
        """The number of logits a token."""
        return int(self.jaxpr.outvars[0].aval.shape[-1])

    @property
    def ids(self) -> int:
        """The number of token ids: as many as there are logits, but where the card of an encoder knows better."""
        if self.card is None or self.is_step or len(self.names("arg")) == 1:
            return self.vocab
        return int(self.card.config.get("vocab_size", self.vocab))

    @functools.cached_property
    def origins(self) -> tuple[Origin, ...]:
        """The trained arrays that the weights are, or were made from."""
        targets: dict[str, list[str]] = {}
        for name in self.names("weight"):
            for trained in self.weights.trained(name):
                targets.setdefault(trained, []).append(name)
        shapes = {origin.name: origin.shape for origin in self.weights.origins}
        shapes |= {name: self.aval(name).shape for name in set(targets) & set(self.names("weight"))}
        return tuple(
            Origin(name, tuple(shapes[name] if name in shapes else np.shape(self.weights.stored[name])), tuple(made))
            for name, made in targets.items()
        )

    def replace(self, **changes: Any) -> "Graph":
        return dataclasses.replace(self, **changes)

    def bind_names(self, values: Mapping[str, Any]) -> list[Any]:
        """Orders `values` (by input name) as the jaxpr takes them."""
        return [values[i.name] for i in self.inputs]

    @functools.cached_property
    def structural_hash(self) -> str:
        """SHA-256 of the printed program: equal for graphs that compute the same thing in the same way."""
        from xlathe.printer import to_text

        return hashlib.sha256(to_text(self).encode()).hexdigest()

    @functools.cached_property
    def arrays(self) -> dict[str, jax.Array]:
        """The prepared weights and constants, on the device."""
        prepared = self.weights.prepare(list(self.names("weight", "const")))
        return {name: jnp.asarray(value) for name, value in prepared.items()}

    def check_batch(self, batch: Any) -> dict[str, np.ndarray]:
        """Returns the arguments of a forward graph by name, int32 [b, t]; raises `RequestError` where they do not fit.

        batch: tokens alone, or a mapping with every argument.
        """
        given, expected = dict(batch) if isinstance(batch, Mapping) else {"tokens": batch}, self.names("arg")
        if not self.is_step and given.keys() != set(expected):
            found = ", ".join(sorted(given)) or "nothing"
            raise RequestError(f"this graph takes {', '.join(sorted(expected))}; got {found}")
        tokens = self.check_tokens(given["tokens"])
        arrays = {name: np.asarray(value) for name, value in given.items()}
        for name, array in arrays.items():
            if array.shape != tokens.shape or array.dtype.kind not in "iub":
                raise RequestError(f"{name} must be whole numbers {list(tokens.shape)}, as tokens, got {array.dtype} "
                                   f"{list(array.shape)}")  # fmt: skip
        return {name: array.astype(np.int32) for name, array in arrays.items()}

    def check_tokens(self, tokens: Any) -> np.ndarray:
        """Returns tokens as int32 [b, t]; raises `RequestError` where they do not fit this graph."""
        array = np.asarray(tokens)
        if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
            raise RequestError(
                f"tokens must be a non-empty integer array [batch, length], got {array.dtype} {list(array.shape)}"
            )
        if array.shape[1] > self.max_len:
            raise RequestError(f"{array.shape[1]} tokens a row, but the graph was traced with max_len={self.max_len}")
        if array.min() < 0 or array.max() >= self.ids:
            bad = array[(array < 0) | (array >= self.ids)][0]
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.ids} tokens (0..{self.ids - 1})")
        return array.astype(np.int32)

    def __call__(self, tokens: Any, **arguments: Any) -> jax.Array:
        """Returns logits [b, t, vocab] of int32 tokens [b, t]; a step graph starts from an empty cache.

        arguments: what else a forward graph takes, int32 [b, t] each.
        """
        batch = self.check_batch({"tokens": tokens, **arguments})
        return self._run_step(batch["tokens"]) if self.is_step else self._run_forward(self.arrays, batch)

    @functools.cached_property
    def _run_forward(self) -> Callable[..., jax.Array]:
        return jax.jit(self.logits)

    def logits(self, arrays: Mapping[str, Any], batch: Mapping[str, Any]) -> jax.Array:
        """Returns logits [b, t, vocab] of a forward graph; a function of arrays, for `jax.grad` and `jax.jit`.

        arrays: values of all weights and constants, as `Graph.arrays` has them; batch: of all arguments, int32 [b, t].
        Neither is checked.
        """
        logits: jax.Array = self.evaluate(self.jaxpr, arrays, batch)[0]
        return logits

    def with_weights(self, arrays: Mapping[str, Any]) -> "Graph":
        """Returns the graph with other values for some of its weights; the others stay as they are, unread.

        Raises OptionError for a name that is no weight's, and for another shape or dtype.
        """
        names = self.names("weight")
        for name, array in arrays.items():
            if name not in names:
                raise OptionError(f"{name!r} is no weight of this graph{did_you_mean(name, names)}")
            aval = self.aval(name)
            shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
            if (shape, dtype) != (aval.shape, aval.dtype):
                found = type(array).__name__ if shape is None or dtype is None else f"{dtype}{list(shape)}"
                raise OptionError(f"{name}: expected an array {aval.dtype}{list(aval.shape)}, found {found}")
        return self.replace(weights=Weights(ChainMap(dict(arrays), self.weights), origins=self.origins))  # type: ignore[arg-type]

    def evaluate(self, jaxpr: ir.Jaxpr, arrays: Mapping[str, Any], batch: Mapping[str, Any]) -> list[Any]:
        """Evaluates a jaxpr with the inputs of this forward graph, at the sizes of a batch."""
        rows, length = batch["tokens"].shape
        return ir.evaluate_at(jaxpr, self.bind_names({**arrays, **batch}), {"b": rows, "t": length})

    def _run_step(self, tokens: np.ndarray) -> jax.Array:
        from xlathe.step import empty_state, ring_slack, run_step

        rows, length = tokens.shape
        state, logits = empty_state(self, rows=rows), []
        chunk = ring_slack(self) or length
        for start in range(0, length, chunk):
            positions = np.arange(start, min(start + chunk, length), dtype=np.int32)
            args = {
                "tokens": tokens[:, positions].reshape(-1),
                "positions": np.tile(positions, rows),
                "rows": np.repeat(np.arange(rows, dtype=np.int32), positions.size),
                "select": np.arange(rows * positions.size, dtype=np.int32),
            }
            new, state = run_step(self, args, state)
            logits.append(new.reshape(rows, positions.size, self.vocab))
        return jnp.concatenate(logits, axis=1)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the graph with its prepared weights; `xlathe.load_graph` reads it back."""
        from xlathe.graph_file import save_graph

        save_graph(self, directory)

    def save_pretrained(self, directory: str | os.PathLike[str], *, layout: str | None = None) -> None:
        """Writes the weights as a Hugging Face directory, which `transformers` loads.

        layout: how other tools are to find quantized weights, `gptq`, `gptq_v2`, `awq` or `compressed-tensors`; codes
            and scales are written as they are.

        Raises CheckpointError where the family's configuration cannot describe this graph, or the layout its scheme, by
        the name of the weight; OptionError for an unknown layout.
        """
        from xlathe.models.export import to_checkpoint
        from xlathe.models.formats.huggingface import write_huggingface

        write_huggingface(to_checkpoint(self, layout), as_path(directory, CheckpointError))

    def report(self) -> str:
        """Returns size, bits a weight, and what each pass matched and nearly matched, as text."""
        from xlathe.report import describe

        return describe(self)


def check_graph(value: Any, taker: str) -> None:
    """Raises OptionError where `value`, given to `taker`, is no graph."""
    if not isinstance(value, Graph):
        raise OptionError(f"{taker} takes a graph (xl.trace makes one of a model), got {type(value).__name__}")
