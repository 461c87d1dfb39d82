"""Held-out perplexity of the demo's models beside a trigram's: `python -m xlathe.models.demo.evaluate`.

The text is that part of the running interpreter's library which no model was trained on. Each model reads
rows of `--window` tokens, each from nothing, and is scored on the next tokens; the trigram on the same.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from xlathe.models import demo
from xlathe.models.demo import corpus, files
from xlathe.models.demo.trigram import Trigram, train_trigram

FLAGS = flags.FLAGS
flags.DEFINE_string("tokens", None, "Training tokens for the trigram: train.npy in train's --workdir.")
flags.DEFINE_integer("limit", 1_000_000, "At most so many held-out tokens.")
flags.DEFINE_integer("window", 512, "Tokens in a row.")


def rows_of(tokens: np.ndarray, context: int) -> np.ndarray:
    """int32 [rows, context + 1]: the last token of one row is the first of the next."""
    starts = range(0, len(tokens) - context, context)
    return np.stack([tokens[start : start + context + 1] for start in starts])


def model_nats(model: nnx.Module, rows: np.ndarray) -> np.ndarray:
    """float32 [rows, context]: -log p of each token of a row but the first, given those before it."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def score(row: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, state)(row[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, row[:, 1:])

    return np.concatenate([score(row[None]) for row in rows])


def trigram_nats(model: Trigram, rows: np.ndarray) -> np.ndarray:
    """float64 [rows, context]: the same of the trigram model; before a row stands the end of text."""
    before = np.pad(rows[:, :-2], ((0, 0), (1, 0)), constant_values=corpus.END_OF_TEXT)
    return -np.log(model.probability(before, rows[:, :-1], rows[:, 1:]))


def main(_: Sequence[str]) -> None:
    rows = rows_of(corpus.held_out_tokens(FLAGS.limit), FLAGS.window)
    text_bytes = sum(len(demo.tokenizer().decode(row[1:].tolist()).encode()) for row in rows)
    nats = {name: model_nats(demo.load(name)[0], rows) for name in files.MODELS}
    if FLAGS.tokens:
        trigram = train_trigram(np.load(Path(FLAGS.tokens)), files.config("target").vocab)
        nats["trigram"] = trigram_nats(trigram, rows)
    table = Table("model", "perplexity", "nats a token", "bits a byte")
    for name, each in nats.items():
        mean, bits = float(each.mean()), float(each.sum()) / math.log(2) / text_bytes
        table.add_row(name, f"{math.exp(mean):.2f}", f"{mean:.3f}", f"{bits:.3f}")
    table.caption = f"{rows[:, 1:].size} held-out tokens, {text_bytes} bytes"
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
