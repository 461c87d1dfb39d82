"""Google DeepMind's gemma (linen): its module takes positions, a cache (none here) and a mask."""

import jax
import jax.numpy as jnp
import pytest

from tests.others.served import LAYERS, VOCAB, check_served, check_small, check_step, optional, peaked

transformer = optional("gemma.transformer")
modules = optional("gemma.modules")

SIZES = {"num_embed": VOCAB, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_layers": LAYERS}
GLOBAL, LOCAL = modules.AttentionType.GLOBAL, modules.AttentionType.LOCAL_SLIDING
FIRST = {
    "num_kv_heads": 1,
    "final_logit_softcap": None,
    "use_post_attn_norm": False,
    "use_post_ffw_norm": False,
    "attention_types": (GLOBAL, GLOBAL),
}
SECOND = {
    "num_kv_heads": 2,
    "final_logit_softcap": 30.0,
    "attn_logits_soft_cap": 50.0,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (LOCAL, GLOBAL),
    "sliding_window_size": 8,
}


@pytest.mark.parametrize("options", [FIRST, SECOND], ids=["gemma", "gemma2"])
def test_traced_shrunk_and_served(options):
    module = transformer.Transformer(transformer.TransformerConfig(**SIZES, **options))

    def forward(variables, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = transformer.make_causal_attn_mask(jnp.ones_like(tokens, bool))
        return module.apply(variables, tokens, positions, None, mask)[0]

    def init(key):
        return module.init(key, jnp.zeros((1, 4), jnp.int32), jnp.arange(4)[None], None, jnp.ones((1, 4, 4), bool))

    variables = peaked(init(jax.random.key(0)))
    fused = check_step(forward, variables)
    if options is SECOND:
        check_served(forward, variables, fused)
        check_small(forward, variables, fused)
