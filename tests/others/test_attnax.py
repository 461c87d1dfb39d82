"""attnax (nnx): rotary, sinusoidal and ALiBi positions, grouped heads, windows; its head is the reader's."""

import pytest
from flax import nnx

from tests.others.served import LAYERS, MAX_LEN, VOCAB, check_served, check_small, check_step, optional, peaked

config = optional("attnax.config")
transformer = optional("attnax.transformer")

OPTIONS = {
    "sinusoidal": {},
    "alibi": {"pos_emb_type": "alibi"},
    "window": {"pos_emb_type": "rope", "attention_window": 8},
    "llama": {"pos_emb_type": "rope", "num_kv_heads": 2, "norm_type": "rms", "ff_activation": "swiglu"},
}
SIZES = {"vocab_size": VOCAB, "d_model": 32, "num_heads": 4, "num_layers": LAYERS, "d_ff": 48, "max_len": MAX_LEN}


@pytest.mark.parametrize("name", OPTIONS)
def test_traced_shrunk_and_served(name):
    model = transformer.TransformerDecoder(nnx.Rngs(0), config.TransformerConfig(**SIZES, **OPTIONS[name]))
    model.eval()
    nnx.update(model, peaked(nnx.state(model, nnx.Param)))
    definition, state = nnx.split(model)

    def forward(state, tokens):
        copy = nnx.merge(definition, state)
        return copy(tokens) @ copy.token_embed.embed.embedding.T

    fused = check_step(forward, state)
    if name == "llama":
        check_served(forward, state, fused)
        check_small(forward, state, fused)
