"""Hugging Face's decoders for Flax (linen), of which transformers 4 is the last to have them."""

import jax.numpy as jnp
import pytest

from tests.others.served import LAYERS, MAX_LEN, VOCAB, check_served, check_small, check_step, optional, peaked

transformers = optional("transformers")
if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("transformers 5 has no Flax models: make test-others", allow_module_level=True)

TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": MAX_LEN} | TOKENS
WIDE = {"intermediate_size": 48, "num_hidden_layers": LAYERS} | SMALL
GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": MAX_LEN} | TOKENS
NEO = {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
MODELS = {
    "GPT2LMHeadModel": ("GPT2Config", GPT),
    "LlamaForCausalLM": ("LlamaConfig", WIDE | {"num_key_value_heads": 2}),
    "MistralForCausalLM": ("MistralConfig", WIDE | {"num_key_value_heads": 2, "sliding_window": 8}),
    "GemmaForCausalLM": ("GemmaConfig", WIDE | {"num_key_value_heads": 1, "head_dim": 8}),
    "GPTNeoForCausalLM": ("GPTNeoConfig", SMALL | NEO),
    "GPTJForCausalLM": ("GPTJConfig", GPT | {"rotary_dim": 4}),
    "BloomForCausalLM": ("BloomConfig", TOKENS | {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4}),
}


def built(name):
    config, options = MODELS[name]
    model = getattr(transformers, f"Flax{name}")(getattr(transformers, config)(**options))
    positions = {} if name.startswith("Bloom") else {"position_ids": jnp.arange(MAX_LEN)[None]}

    def forward(params, tokens):
        given = {k: jnp.broadcast_to(v[:, : tokens.shape[1]], tokens.shape) for k, v in positions.items()}
        return model.module.apply({"params": params}, tokens, jnp.ones_like(tokens), **given).logits

    return forward, peaked(model.params)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_step_equals_the_forward(name):
    check_step(*built(name))


@pytest.mark.filterwarnings("ignore")
def test_gpt2_is_served():
    forward, params = built("GPT2LMHeadModel")
    fused = check_step(forward, params)
    check_served(forward, params, fused)
    check_small(forward, params, fused)
