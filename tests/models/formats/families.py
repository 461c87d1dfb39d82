"""A tiny checkpoint of every family, with a `config.json` as transformers 5.23 writes it and random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.tiny import tiny_checkpoint
from xlathe.card import Card
from xlathe.models.checkpoint import Checkpoint, Tensor
from xlathe.models.pretrained import to_graph

CONFIGS = Path(__file__).parent / "configs"
FAMILIES = tuple(sorted(path.stem for path in CONFIGS.iterdir()))
PROMPT, NEW = 24, 16  # tokens


def load(family: str) -> Checkpoint:
    return tiny_checkpoint(json.loads((CONFIGS / f"{family}.json").read_text()))


def of_arrays(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Checkpoint:
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}  # type: ignore[misc]
    return Checkpoint(Card(config), tensors, "arrays")


def compute(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Returns two prompts, int32 [2, 24], and what our forward, which is compared with transformers, makes of them.

    Of a decoder `logits` [2, 24, vocab] and `greedy` [40], the first prompt and what follows it; of an encoder
    `last_hidden_state`.
    """
    graph = to_graph(checkpoint)
    ids = np.random.default_rng(0).integers(0, graph.ids, (2, PROMPT), dtype=np.int32)
    if "attention_mask" in graph.names("arg"):
        states = graph(ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
        return {"input_ids": ids, "last_hidden_state": np.asarray(states)}
    text = ids[:1]
    for _ in range(NEW):
        text = np.append(text, np.asarray(graph(text))[:, -1:].argmax(-1), axis=1)
    return {"input_ids": ids, "logits": np.asarray(graph(ids)), "greedy": text[0]}
