"""dantinox (nnx): grouped heads with rotary features that are written in place."""

from flax import nnx

from tests.others.served import LAYERS, MAX_LEN, VOCAB, check_served, check_small, check_step, optional, peaked

config = optional("dantinox.core.config")
dantinox = optional("dantinox.core.model")


def test_traced_shrunk_and_served():
    sizes = {"dim": 32, "n_heads": 4, "kv_heads": 2, "num_blocks": LAYERS, "max_context": MAX_LEN}
    model = dantinox.Transformer(config.ModelConfig(paradigm="ar", vocab_size=VOCAB, **sizes), rngs=nnx.Rngs(0))
    model.eval()
    nnx.update(model, peaked(nnx.state(model, nnx.Param)))
    definition, state = nnx.split(model)

    def forward(state, tokens):
        return nnx.merge(definition, state)(tokens, deterministic=True).logits

    fused = check_step(forward, state)
    check_served(forward, state, fused)
    check_small(forward, state, fused)
