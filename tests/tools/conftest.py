"""A model that is quick to compile, traced and on disk."""

from pathlib import Path

import pytest
from flax import nnx

import xlathe as xl
from xlathe.models import demo
from xlathe.models.llama import Llama, LlamaConfig

TINY = LlamaConfig(vocab=4096, width=32, layers=1, query_heads=2, key_value_heads=1, head_dim=16, hidden=32)


@pytest.fixture(scope="session")
def tiny() -> xl.Graph:
    return xl.trace(Llama(TINY, rngs=nnx.Rngs(0)), max_len=32, tokenizer=demo.tokenizer())


@pytest.fixture(scope="session")
def tiny_folder(tiny: xl.Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs") / "tiny"
    tiny.save(folder)
    return folder
