"""bert: an encoder, without the pooler and the heads of its pretraining, as llama.cpp has it."""

from typing import Any, Final

from xlathe.models.formats.gguf.architecture import LENGTHS, Architecture, Key
from xlathe.models.formats.gguf.changes import Config
from xlathe.models.formats.gguf.header import Header, lookup
from xlathe.models.formats.gguf.rules import Renamed

E: Final = "encoder.layer.{b}."
TOKEN_TYPES: Final = "tokenizer.ggml.token_type_count"


def read(header: Header, config: Config) -> dict[str, Any]:
    has_types = "token_types.weight" in header.file.entries
    rows = header.shape("token_types.weight", 2)[0] if has_types else 1
    return {"type_vocab_size": lookup(header.file, TOKEN_TYPES, int, rows), "tie_word_embeddings": True}


def write(config: Config) -> dict[str, Any]:
    return {"attention.causal": False}


BERT: Final = Architecture(
    name="bert",
    model_types=("bert",),
    prefix="",
    keys=(*LENGTHS, Key("attention.layer_norm_epsilon", "layer_norm_eps", float)),
    once=(
        Renamed("token_embd", "embeddings.word_embeddings"),
        Renamed("position_embd", "embeddings.position_embeddings"),
        Renamed("token_types", "embeddings.token_type_embeddings"),
        Renamed("token_embd_norm", "embeddings.LayerNorm"),
    ),
    block=(
        Renamed("blk.{b}.attn_q", E + "attention.self.query"),
        Renamed("blk.{b}.attn_k", E + "attention.self.key"),
        Renamed("blk.{b}.attn_v", E + "attention.self.value"),
        Renamed("blk.{b}.attn_output", E + "attention.output.dense"),
        Renamed("blk.{b}.attn_output_norm", E + "attention.output.LayerNorm"),
        Renamed("blk.{b}.ffn_up", E + "intermediate.dense"),
        Renamed("blk.{b}.ffn_down", E + "output.dense"),
        Renamed("blk.{b}.layer_output_norm", E + "output.LayerNorm"),
    ),
    fixed={"hidden_act": "gelu", "is_decoder": False},
    read=read,
    write=write,
    dropped=("pooler.", "cls.", "embeddings.position_ids"),
)
