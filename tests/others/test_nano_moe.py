"""nano-moe-jax (linen): every expert computes, and each token looks up what its own two made."""

import jax
import jax.numpy as jnp

from tests.others.served import LAYERS, MAX_LEN, VOCAB, check_served, check_small, check_step, optional, peaked

nano_moe = optional("nano_moe.model")
config = optional("nano_moe.config")


def test_traced_shrunk_and_served():
    sizes = {"n_heads": 4, "d_model": 32, "d_ff": 48, "n_experts": 4, "top_k": 2, "block_size": MAX_LEN}
    module = nano_moe.NanoMoE(config.NanoMoEConfig(vocab_size=VOCAB, n_layers=LAYERS, **sizes))
    variables = peaked(module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))

    def forward(variables, tokens):
        return module.apply(variables, tokens)[0]

    fused = check_step(forward, variables)
    check_served(forward, variables, fused)
    check_small(forward, variables, fused)
