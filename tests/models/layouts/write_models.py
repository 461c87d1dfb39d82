"""Writes the directories that other tools read: `python -m tests.models.layouts.write_models FOLDER`."""

import functools
import sys
from pathlib import Path

import numpy as np

import xlathe as xl
from tests.models.layouts.cases import CONFIG, MODELS, Case
from tests.models.parity.values import values
from tests.models.tiny import tiny_checkpoint
from xlathe import passes
from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.pretrained import to_graph

FLOATS = ((".*(embedding|head/kernel)", "none"),)


@functools.cache
def float_graph(tied: bool = False) -> xl.Graph:
    """Returns a small Llama with the numbers of `values`, the same everywhere."""
    config = {**CONFIG, "tie_word_embeddings": True} if tied else CONFIG
    shapes = {name: tensor.shape for name, tensor in tiny_checkpoint(config).tensors.items()}
    tensors = {name: _tensor(values("layouts", name, shape)) for name, shape in shapes.items()}
    return to_graph(Checkpoint(Card(config), tensors, "test"))


def _tensor(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


@functools.cache
def quantized_graph(case: Case) -> xl.Graph:
    rules = (*FLOATS, *([(f".*/{case.floats}/.*", "none")] if case.floats else []))
    return xl.Pipeline([passes.Quantize(case.scheme, rules=rules)])(float_graph(case.tied))


def main() -> None:
    for case in MODELS:
        quantized_graph(case).save_pretrained(Path(sys.argv[1]) / case.name, layout=case.layout)
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
