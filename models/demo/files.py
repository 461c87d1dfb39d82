"""The demo's files: tokenizer, configurations (JSON) and weights (float16 safetensors, the model's names)."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from xlathe.card import Card
from xlathe.errors import OptionError, did_you_mean
from xlathe.models.llama import Llama, LlamaConfig, describe

FOLDER = Path(str(resources.files("xlathe.models.demo")))
MODELS = ("target", "draft", "half")  # half: the target with half its parameters, distilled
TOKENIZER = FOLDER / "tokenizer.json"
END_OF_TEXT = 0  # the token id that precedes every file
CONTEXT = 512  # tokens in the rows that the models were trained on


def tokenizer() -> Tokenizer:
    """The byte-level tokenizer that the demo's models share; id 0 is the end of text."""
    return Tokenizer.from_file(str(TOKENIZER))


def config(name: str) -> LlamaConfig:
    """The sizes of the model `name`, one of `MODELS`."""
    return LlamaConfig(**json.loads((FOLDER / f"{name}.json").read_text()))


def card(name: str) -> Card:
    """What a checkpoint says of the model `name`."""
    config_json = describe(config(name), positions=CONTEXT)
    return Card(config_json | {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT})


def save(params: Mapping[Any, Any], path: Path) -> None:
    """Writes nested `params` as float16 under names such as `layers/0/attention/query/kernel`."""
    flat = flatten_dict(params)
    save_file({"/".join(map(str, keys)): np.asarray(value, np.float16) for keys, value in flat.items()}, path)


def read(path: Path) -> dict[Any, Any]:
    """What `save` wrote, in float32: nested, layers numbered by integers."""
    flat = {}
    for name, array in load_file(path).items():
        keys = tuple(int(part) if part.isdigit() else part for part in name.split("/"))
        flat[keys] = jnp.asarray(array, jnp.float32)
    return unflatten_dict(flat)


def load(name: str) -> tuple[Llama, Tokenizer]:
    """One of the trained `MODELS`, in float32, and its tokenizer. Any other name: `OptionError`."""
    if name not in MODELS:
        raise OptionError(f"no demo model {name!r}{did_you_mean(name, MODELS)}")
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Llama(config(name), rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, read(FOLDER / f"{name}.safetensors")), tokenizer()
