"""Merges two fine-tunes of the demo's model by every method and scores them beside their parents, on both domains.

`python -m xlathe.tools.merge_table FOLDER` trains the two, unless FOLDER has them, and prints a table in Markdown. One
is trained on the tests of Python's standard library, one on JAX, as they are installed.
"""

import math
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files as installed
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from xlathe.models import demo
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.demo import corpus, files
from xlathe.models.demo.evaluate import rows_of
from xlathe.models.demo.train import Params, Plan, fit, make_loss
from xlathe.models.family import find_family
from xlathe.models.naming import assign, is_turned, their_name
from xlathe.passes import Canonicalize, FuseAttention
from xlathe.passes.merge.combine import combine
from xlathe.passes.merge.merge import merge
from xlathe.passes.merge.recipe import parse_recipe
from xlathe.passes.merge.statistics import fisher, regmean
from xlathe.passes.observe import observe
from xlathe.pipeline import Pipeline
from xlathe.safetensors_file import Tensor
from xlathe.tools.source import trace_demo

PLAN: Final = Plan(steps=100, decay_steps=50, rows=4, context=256, learning_rate=2e-3)
SCORED: Final = 8_192  # held-out tokens of each domain
SAMPLES: Final = 16  # rows of training text that Fisher information and RegMean's activations are taken from
HALF: Final = {"weight": 0.5}
WHOLE: Final = {"weight": 1.0}
SPARSE: Final = {"density": 0.5}
METHODS: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    *(("linear", HALF), ("slerp", {"t": 0.5}), ("nuslerp", HALF), ("multislerp", HALF), ("karcher", {})),
    *(("task_arithmetic", HALF), ("task_arithmetic", WHOLE), ("ties", WHOLE | SPARSE)),
    ("ties", WHOLE | SPARSE | {"scope": "model"}),
    *(("dare_linear", HALF | SPARSE), ("dare_ties", HALF | SPARSE), ("della_linear", HALF), ("della", HALF)),
    *(("breadcrumbs", WHOLE | SPARSE), ("breadcrumbs_ties", WHOLE | SPARSE), ("sce", {}), ("model_stock", {})),
    *(("nearswap", {"t": 1e-3}), ("passthrough", {})),
)
"""Parameters that a recipe must have, or that the default of leaves every number in its place."""
PARENTS: Final = ("tests", "jax")


def library(domain: str) -> Path:
    """Returns the folder of a domain's text."""
    return Path(sysconfig.get_path("stdlib")) / "test" if domain == "tests" else Path(str(installed("jax")))


def tokens_of(domain: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids of a domain, to train on and held out: int32 [n], int32 [SCORED + 1]."""
    folder, tokenizer = library(domain), files.tokenizer()
    training = corpus.encode_files(corpus.training_files([folder]), tokenizer)
    return training, corpus.encode_files(corpus.held_out_files(folder), tokenizer)[: SCORED + 1]


def checkpoint_of(params: Params, where: str) -> Checkpoint:
    """Returns the weights of a demo model as Hugging Face's files would name and turn them."""
    card = demo.card("target")
    family = find_family(card.config, where)
    tensors = {}
    for ours, array in _flat(params).items():
        held = np.asarray(array).T if is_turned(family, ours) else np.asarray(array)
        tensors[their_name(family, ours)] = Tensor(held.shape, held.dtype, lambda held=held: held)  # type: ignore[misc]
    return Checkpoint(card, tensors, where, demo.tokenizer())


def params_of(checkpoint: Checkpoint, like: Params) -> Params:
    """Returns what `checkpoint_of` takes."""
    shapes = {name: array.shape for name, array in _flat(like).items()}
    family = find_family(checkpoint.card.config, checkpoint.where)
    found = assign(family, shapes, checkpoint, "float32", finite=True)
    return _nested({name: jnp.asarray(tensor.read()) for name, tensor in found.items()}, like)


def _flat(params: Params) -> dict[str, Any]:
    return {"/".join(map(str, key)): value for key, value in flatten_dict(params).items()}


def _nested(arrays: Mapping[str, Any], like: Params) -> Params:
    """Undoes `_flat`."""
    return unflatten_dict({key: arrays["/".join(map(str, key))] for key in flatten_dict(like)})


def recipe_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a recipe of both parents. Methods that move from one model to another have the first as their base."""
    if method == "passthrough":
        cut = files.config("target").layers // 2
        ranges = {"tests": [0, cut], "jax": [cut, 2 * cut]}
        listed = [{"sources": [{"model": name, "layer_range": taken}]} for name, taken in ranges.items()]
        return {"merge_method": method, "slices": listed}
    base = "tests" if method in ("slerp", "nearswap") else "shipped"
    others = [{"model": name} for name in PARENTS if name != base]
    based = {} if method == "linear" else {"base_model": base}
    return {"merge_method": method, "models": others, "parameters": dict(given), **based}


def samples(tokens: np.ndarray) -> np.ndarray:
    """Returns rows of training text, far from each other."""
    return rows_of(tokens, PLAN.context)[:: len(tokens) // PLAN.context // SAMPLES][:SAMPLES]


def information(loss: Callable[[Params, jax.Array], jax.Array], params: Params, tokens: np.ndarray) -> Params:
    """Returns the mean square of the gradients of rows' losses, as `params`."""
    take = jax.jit(jax.grad(loss))
    total = jax.tree.map(jnp.zeros_like, params)
    for row in samples(tokens):
        total = jax.tree.map(lambda t, g: t + g * g / SAMPLES, total, take(params, row[None]))
    return total


def regmean_of(models: Sequence[Params], texts: Sequence[np.ndarray]) -> Params:
    """Returns RegMean of matrices by the activations of each model on its own text, and the mean of all else."""
    graph = Pipeline([Canonicalize(), FuseAttention()])(trace_demo("target"))
    family = find_family(demo.card("target").config, "table")
    seen = [
        observe(graph.with_weights(_flat(params)), [row[None, :-1] for row in samples(text)], gram=True).inputs
        for params, text in zip(models, texts, strict=True)
    ]
    merged = {}
    for name in _flat(models[0]):
        arrays = [_flat(params)[name] for params in models]
        if is_turned(family, name):
            grams = [jnp.asarray(stats[name].gram, jnp.float32) for stats in seen]
            merged[name] = regmean([array.T for array in arrays], grams).T
        else:
            merged[name] = combine(arrays, [1 / len(arrays)] * len(arrays))
    return _nested(merged, models[0])


def main(folder: Path) -> None:
    logging.set_verbosity(logging.INFO)
    texts = {domain: tokens_of(domain) for domain in PARENTS}
    config, loss = files.config("target"), make_loss(files.config("target"))
    shipped = files.read(files.FOLDER / "target.safetensors")
    models: dict[str, Params] = {"shipped": shipped}
    for domain, (training, held_out) in texts.items():
        models[domain] = fit(config, PLAN, shipped, training, held_out, (folder / domain).absolute())
    score = jax.jit(loss)
    rows = {domain: rows_of(held_out, files.CONTEXT) for domain, (_, held_out) in texts.items()}

    def show(name: str, options: str, params: Params) -> None:
        each = [np.mean([score(params, row[None]) for row in rows[domain]]) for domain in PARENTS]
        cells = [f"{math.exp(nats):.2f}" for nats in (*each, np.mean(each))]
        print("|", " | ".join([name, options, *cells]), "|", flush=True)

    print("| model | parameters | tests | jax | geometric mean |\n|---|---|---|---|---|")
    for name, params in models.items():
        show(name, "", params)
    opened = {name: checkpoint_of(params, name) for name, params in models.items()}
    for method, given in METHODS:
        merged = merge(parse_recipe(recipe_of(method, given), "table"), opened)
        show(f"`{method}`", ", ".join(f"{key} {value}" for key, value in given.items()), params_of(merged, shipped))
    found = [information(loss, models[domain], texts[domain][0]) for domain in PARENTS]
    pairs = [models[domain] for domain in PARENTS]
    show("RegMean", f"{SAMPLES} rows", regmean_of(pairs, [texts[domain][0] for domain in PARENTS]))
    show("Fisher", f"{SAMPLES} rows", jax.tree.map(lambda *x: fisher(list(x[:2]), list(x[2:])), *pairs, *found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
