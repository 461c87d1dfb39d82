"""The plain Llama forward against formulas of the papers, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import export

from xlathe.models.demo import files
from xlathe.models.layers import Attention, GatedFeedForward, Heads
from xlathe.models.llama import Llama, LlamaConfig
from xlathe.models.rope import Rope

TINY = LlamaConfig(vocab=50, width=24, layers=2, query_heads=4, key_value_heads=2, head_dim=8, hidden=40)


def relative_error(actual: jax.Array, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(TINY, rngs=nnx.Rngs(0))


def tokens(b: int, t: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, TINY.vocab, (b, t)).astype(np.int32)


def numpy_rotary(x: np.ndarray, theta: float) -> np.ndarray:
    """RoFormer, section 3.2: channel pair (i, i + d/2) as a complex number, turned by exp(i m theta_i)."""
    half = x.shape[-1] // 2
    frequency = [theta ** (-2 * i / x.shape[-1]) for i in range(half)]
    turn = np.array([[np.exp(1j * m * f) for f in frequency] for m in range(x.shape[1])])
    turned = (x[..., :half] + 1j * x[..., half:]) * turn[None, :, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def numpy_attention(x: np.ndarray, layer: Attention, config: LlamaConfig) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v head by head; query head h reads key-value head h // group."""
    b, t, _ = x.shape
    query, key, value = (
        (x @ np.asarray(part.kernel[...], np.float64)).reshape(b, t, -1, config.head_dim)
        for part in (layer.query, layer.key, layer.value)
    )
    query, key = numpy_rotary(query, config.rope_theta), numpy_rotary(key, config.rope_theta)
    group = config.query_heads // config.key_value_heads
    heads = []
    for h in range(config.query_heads):
        scores = query[:, :, h] @ key[:, :, h // group].swapaxes(1, 2) / np.sqrt(config.head_dim)
        weights = np.exp(scores) * np.tril(np.ones((t, t)))
        heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, :, h // group])
    return np.concatenate(heads, axis=-1) @ np.asarray(layer.output.kernel[...], np.float64)


def test_rotary_is_the_paper_s() -> None:
    x = np.random.default_rng(0).normal(size=(2, 9, 3, 8))
    assert relative_error(Rope.plain(8, 10_000.0)(jnp.asarray(x, jnp.float32)), numpy_rotary(x, 10_000.0)) < 1e-5


def test_attention_is_the_paper_s() -> None:
    layer = Attention(TINY.width, Heads(4, 2, 8), Rope.plain(8, TINY.rope_theta), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 7, TINY.width))
    assert relative_error(layer(jnp.asarray(x, jnp.float32)), numpy_attention(x, layer, TINY)) < 1e-5


def test_feed_forward_is_the_paper_s() -> None:
    layer = GatedFeedForward(TINY.width, TINY.hidden, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 7, TINY.width))
    gate, up, down = (np.asarray(part.kernel[...], np.float64) for part in (layer.gate, layer.up, layer.down))
    expected = ((x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    assert relative_error(layer(jnp.asarray(x, jnp.float32)), expected) < 1e-5


def test_a_later_token_changes_no_earlier_logits(model: Llama) -> None:
    before = tokens(2, 12)
    after = before.copy()
    after[:, 8] = (after[:, 8] + 1) % TINY.vocab
    first, second = model(jnp.asarray(before)), model(jnp.asarray(after))
    np.testing.assert_array_equal(first[:, :8], second[:, :8])
    assert (np.abs(first[:, 8:] - second[:, 8:]).max(axis=(0, 2)) > 1e-4).all()


def test_batch_and_length_may_be_symbolic(model: Llama) -> None:
    b, t = export.symbolic_shape("b, t")
    exported = export.export(jax.jit(model))(jax.ShapeDtypeStruct((b, t), jnp.int32))
    for shape in ((1, 5), (3, 11)):
        assert relative_error(exported.call(tokens(*shape)), np.asarray(model(tokens(*shape)))) < 1e-5


@pytest.mark.parametrize(("name", "count"), [("target", 8_129_792), ("draft", 819_840)])
def test_parameter_count(name: str, count: int) -> None:
    state = nnx.state(nnx.eval_shape(lambda: Llama(files.config(name), rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == count


def test_weight_names(model: Llama) -> None:
    state = nnx.to_pure_dict(nnx.state(model))
    layer = {f"attention/{part}/kernel" for part in ("query", "key", "value", "output")}
    layer |= {f"feed_forward/{part}/kernel" for part in ("gate", "up", "down")}
    layer |= {"attention_norm/scale", "feed_forward_norm/scale"}
    expected = {f"layers/{i}/{name}" for i in range(2) for name in layer}
    expected |= {"embedding/embedding", "norm/scale"}
    assert {"/".join(map(str, keys)) for keys in flatten_dict(state)} == expected
