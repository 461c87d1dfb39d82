"""Trains one of the demo's models: `python -m xlathe.models.demo.train --help`.

Stopped and started again with the same flags it goes on from its last checkpoint and gives the same weights,
since the data of a step depend on the number of the step alone. The learning rate warms up, stays, and falls
to zero over the last `--decay_steps`, so that `--steps` may be changed until the fall begins.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import app, flags, logging
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from xlathe.models.demo import bpe, corpus, files
from xlathe.models.llama import Llama, LlamaConfig

WARM_UP = 50  # steps
LOG_EVERY = 20  # steps
SCORE_EVERY = 200  # steps
SCORED = 16_384  # held-out tokens
CHECKPOINT_EVERY = 300  # seconds

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("corpus", None, "Standard library folders, the oldest version first.")
flags.DEFINE_string("workdir", str(Path.home() / ".cache/xlathe/demo"), "For tokens and checkpoints.")
flags.DEFINE_enum("model", "target", files.MODELS, "Which of the demo's models.")
flags.DEFINE_integer("layers", None, "Trains a model of fewer layers, to be grown later by --grow_from.")
flags.DEFINE_string("grow_from", None, "Weights of a model of fewer layers to start from.")
flags.DEFINE_integer("steps", 3000, "Steps in all, those before a restart included.")
flags.DEFINE_integer("decay_steps", 800, "Steps over which the learning rate falls to zero at the end.")
flags.DEFINE_integer("rows", 8, "Rows in a batch.")
flags.DEFINE_integer("context", files.CONTEXT, "Tokens in a row.")
flags.DEFINE_float("learning_rate", 5e-3, "The highest learning rate.")

Params = Any  # nested dict of float32 arrays


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long, on what batches and at what rate a model is trained."""

    steps: int
    decay_steps: int
    rows: int
    context: int
    learning_rate: float


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: jax.Array  # int32 []: steps taken
    params: Params
    optimizer: optax.OptState


def matrices(params: Params) -> Any:
    """Marks the weights that Muon takes: the kernels. None, for embedding and norms, means AdamW."""

    def mark(path: tuple[Any, ...], _: jax.Array) -> MuonDimensionNumbers | None:
        return MuonDimensionNumbers() if path[-1].key == "kernel" else None

    return jax.tree_util.tree_map_with_path(mark, params)


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """Muon for matrices and AdamW for the rest, https://arxiv.org/abs/2502.16982; warm-up, plateau, decay."""

    def rate(step: Any) -> Any:  # an optax.Schedule
        shape = jnp.minimum((step + 1) / WARM_UP, (plan.steps - step) / plan.decay_steps)
        return plan.learning_rate * jnp.clip(shape, 0.0, 1.0)

    update = muon(
        rate,
        ns_steps=4,
        preconditioning="aol",
        weight_decay=0.05,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def batch(tokens: np.ndarray, step: int, plan: Plan) -> np.ndarray:
    """The rows of a step, int32 [rows, context + 1]: each window of `tokens` once an epoch."""
    windows = (len(tokens) - 1) // plan.context
    numbers = range(step * plan.rows, (step + 1) * plan.rows)
    starts = [window_order(windows, n // windows)[n % windows] * plan.context for n in numbers]
    return np.stack([tokens[start : start + plan.context + 1] for start in starts]).astype(np.int32)


@functools.lru_cache(maxsize=2)
def window_order(windows: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(windows)


def initialize(config: LlamaConfig) -> Params:
    """First weights. What a layer adds to the residual stream starts at zero."""
    params = nnx.to_pure_dict(nnx.state(Llama(config, rngs=nnx.Rngs(0))))
    return {**params, "layers": {i: silence(layer) for i, layer in params["layers"].items()}}


def silence(layer: Params) -> Params:
    """A layer that adds nothing to the residual stream until it is trained."""
    attention, feed_forward = layer["attention"], layer["feed_forward"]
    output, down = (jax.tree.map(jnp.zeros_like, part) for part in (attention["output"], feed_forward["down"]))
    return layer | {
        "attention": attention | {"output": output},
        "feed_forward": feed_forward | {"down": down},
    }


def grow(params: Params, layers: int) -> Params:
    """The weights of a deeper model that computes the same: behind each layer come silent copies of it.

    Training the first part of the way at a fraction of the depth costs less for the same loss:
    https://arxiv.org/abs/2405.15319 (which compares ways to grow).
    """
    few = params["layers"]
    origins = [i * len(few) // layers for i in range(layers)]
    deep = {i: few[origin] if origin not in origins[:i] else silence(few[origin]) for i, origin in enumerate(origins)}
    return {**params, "layers": jax.tree.map(jnp.array, deep)}


def make_loss(config: LlamaConfig) -> Callable[[Params, jax.Array], jax.Array]:
    """`loss(params, rows)`: the mean of -log p(next token), in nats, over rows int32 [b, t + 1]."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))

    def loss(params: Params, rows: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(rows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    return loss


@functools.cache
def make_step(config: LlamaConfig, plan: Plan) -> Callable[[TrainState, np.ndarray], tuple[TrainState, jax.Array]]:
    """The compiled `step(state, rows) -> (next state, loss before it)`; the state is donated."""
    optimizer, loss = make_optimizer(plan), make_loss(config)

    def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state.params, rows)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), value

    return jax.jit(step, donate_argnums=0)


def fit(
    config: LlamaConfig, plan: Plan, params: Params, tokens: np.ndarray, held_out: np.ndarray, folder: Path
) -> Params:
    """Trains from `params`, or from the last checkpoint in `folder`, and returns the weights after all steps.

    `tokens` and `held_out` are token ids [n]. Each checkpoint writes `folder`.safetensors too.
    """
    take_step, score = make_step(config, plan), jax.jit(make_loss(config))
    scored = batch(held_out, 0, dataclasses.replace(plan, rows=(len(held_out) - 1) // plan.context))
    params = jax.tree.map(jnp.copy, params)  # the state is donated, the caller's weights are not
    state = TrainState(jnp.int32(0), params, make_optimizer(plan).init(params))
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        saved = shown = time.monotonic()
        losses: list[float] = []
        for step in range(int(state.step) + 1, plan.steps + 1):
            state, loss = take_step(state, batch(tokens, step - 1, plan))
            losses.append(float(loss))
            if step % LOG_EVERY == 0:
                speed = len(losses) * plan.rows * plan.context / (time.monotonic() - shown)
                logging.info("step %d of %d  loss %.4f  %.0f tokens/s", step, plan.steps, np.mean(losses), speed)
                losses, shown = [], time.monotonic()
            if step % SCORE_EVERY == 0:
                logging.info("step %d  held-out loss %.4f", step, score(state.params, scored))
            if time.monotonic() - saved > CHECKPOINT_EVERY or step == plan.steps:
                manager.save(step, args=ocp.args.StandardSave(state))
                files.save(state.params, folder.with_suffix(".safetensors"))
                saved = time.monotonic()
    return state.params


def prepare(libraries: Sequence[Path], workdir: Path) -> np.ndarray:
    """The training tokens, kept as uint16 in `workdir`; learns the tokenizer if its file is missing."""
    cache = workdir / "train.npy"
    if not cache.exists() or not files.TOKENIZER.exists():
        texts = corpus.training_files(libraries)
        if not files.TOKENIZER.exists():
            bpe.train_tokenizer(texts, files.config("target").vocab).save(str(files.TOKENIZER))
        tokens = corpus.encode_files(texts, files.tokenizer())
        size = sum(len(text.encode()) for text in texts)
        logging.info("%d files, %d bytes, %d tokens", len(texts), size, len(tokens))
        np.save(cache, tokens.astype(np.uint16))
    return np.load(cache)


def main(_: Sequence[str]) -> None:
    workdir = Path(FLAGS.workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    tokens = prepare([Path(folder) for folder in FLAGS.corpus], workdir)
    config = files.config(FLAGS.model)
    name = FLAGS.model
    if FLAGS.layers:
        config, name = dataclasses.replace(config, layers=FLAGS.layers), f"{name}-{FLAGS.layers}"
    params = grow(files.read(Path(FLAGS.grow_from)), config.layers) if FLAGS.grow_from else initialize(config)
    plan = Plan(FLAGS.steps, FLAGS.decay_steps, FLAGS.rows, FLAGS.context, FLAGS.learning_rate)
    fit(config, plan, params, tokens, corpus.held_out_tokens(SCORED + 1), workdir / name)


if __name__ == "__main__":
    flags.mark_flag_as_required("corpus")
    app.run(main)
