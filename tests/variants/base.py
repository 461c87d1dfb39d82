"""What a variant is, how to run its author's code, and the plain parts that several authors share."""

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MAX_LEN = 61, 32, 2, 4, 2, 8, 64, 64
SHARP = 1.6 / math.sqrt(
    WIDTH
)  # std of query and key weights: scores get a std near 2.5, so a wrong mask shows
FLAT = 1.0 / math.sqrt(WIDTH)

type Params = dict[str, Any]
type Attend = Callable[[Params, jax.Array], jax.Array]  # (layer, normalized x [b, t, d]) -> [b, t, d]
type Forward = Callable[[Params, jax.Array], jax.Array]  # (params, tokens [b, t]) -> logits [b, t, vocab]


@dataclass(frozen=True)
class Variant:
    """One way to write a decoder: int32 tokens [b, t] in, logits [b, t, vocab] out, for 1 <= t <= max_len.

    `build()` returns what a user hands to `xlathe.trace`: an `nnx.Module`, a pair (linen module, variables),
    or a pair (function of params and tokens, params). Every call returns the same weights.
    """

    name: str
    build: Callable[[], Any]
    layers: int = LAYERS  # attentions to be matched; 0: none, or the variant is to be refused
    max_len: int = MAX_LEN
    vocab: int = VOCAB
    symbolic: bool = True  # can be traced with symbolic b and t; otherwise at two concrete lengths
    rtol: float = 1e-5  # what a derived decode step can be held to: max |difference| / max |reference|
    window: int = 0  # tokens that a query sees in every layer, itself included; 0: all
    notes: str = ""
    twin: Callable[[], Any] | None = None  # builds the same function, written plainly
    reason: str = ""  # refused only: regex to be found in the error
    author: Callable[..., Any] | type | None = (
        None  # refused only: whose source has the line marked `# refused`
    )
    causal: bool = True  # whether logits of a prefix are independent of what follows it

    def __repr__(self) -> str:
        return self.name

    @property
    def refused_at(self) -> tuple[str, int]:
        """File name and line number which the error about a refused variant has to name."""
        assert self.author is not None, f"{self.name} is not a refused variant"
        lines, first = inspect.getsourcelines(self.author)
        (offset,) = [i for i, line in enumerate(lines) if "# refused" in line]
        return Path(inspect.getfile(self.author)).name, first + offset


@functools.cache
def forward(build: Variant | Callable[[], Any]) -> Callable[[jax.Array | np.ndarray], jax.Array]:
    """The author's own code with its weights, compiled once for each of the sizes it is called with: the oracle."""
    function, weights = as_function(build.build() if isinstance(build, Variant) else build())
    compiled = jax.jit(function)
    return lambda tokens: compiled(weights, tokens)


def as_function(model: Any) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """Whatever `build` returns, as a pure function of weights and tokens, and the weights."""
    if isinstance(model, nnx.Module):
        graphdef, state = nnx.split(model)
        return lambda state, tokens: nnx.merge(graphdef, state)(tokens), state
    code, weights = model
    return (code.apply if isinstance(code, linen.Module) else code), weights


def init_nnx[M: nnx.Module](module: Callable[[nnx.Rngs], M], seed: int) -> M:
    """A module with weights from `fill` and zeros elsewhere; unlike the usual start it compiles nothing."""
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))), nnx.Param, ...)
    return nnx.merge(graphdef, fill(params, seed), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest))


def init_linen(module: linen.Module, seed: int, **collections: Params) -> tuple[linen.Module, Params]:
    """A module and its variables: weights from `fill`, other collections as given."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return module, {"params": fill(shapes["params"], seed)} | collections


def fill[Tree](shapes: Tree, seed: int) -> Tree:
    """Random weights by name; biases and scales differ from their neutral values, so none can be lost."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = set(re.findall(r"\w+", jax.tree_util.keystr(path)))
        if names & {"bias", "scale", "norm1", "norm2"}:
            return float("bias" not in names) + normal(rng, *leaf.shape, std=0.1)
        if names & {"query", "key", "q_proj", "k_proj", "qkv", "c_attn", "wq", "wk"}:
            return normal(rng, *leaf.shape, std=SHARP)
        return normal(rng, *leaf.shape, std=1.0 if "embedding" in names else FLAT)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def normal(rng: np.random.Generator, *shape: int, std: float = FLAT) -> jax.Array:
    return jnp.asarray(rng.normal(0.0, std, shape), jnp.float32)


def layer_params(rng: np.random.Generator, kv_heads: int = HEADS) -> Params:
    """One block: matrices are [in, out], heads are consecutive slices of `out`."""
    return {
        "norm1": 1.0 + normal(rng, WIDTH, std=0.1),
        "wq": normal(rng, WIDTH, HEADS * HEAD_DIM, std=SHARP),
        "wk": normal(rng, WIDTH, kv_heads * HEAD_DIM, std=SHARP),
        "wv": normal(rng, WIDTH, kv_heads * HEAD_DIM),
        "wo": normal(rng, HEADS * HEAD_DIM, WIDTH),
        "norm2": 1.0 + normal(rng, WIDTH, std=0.1),
        "up": normal(rng, WIDTH, HIDDEN),
        "down": normal(rng, HIDDEN, WIDTH, std=1.0 / math.sqrt(HIDDEN)),
    }


def decoder_params(seed: int, kv_heads: int = HEADS, layers: int = LAYERS) -> Params:
    rng = np.random.default_rng(seed)
    return {
        "embed": normal(rng, VOCAB, WIDTH, std=1.0),
        "layers": [layer_params(rng, kv_heads) for _ in range(layers)],
        "norm": 1.0 + normal(rng, WIDTH, std=0.1),
        "unembed": normal(rng, WIDTH, VOCAB),
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale


def mlp(layer: Params, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ layer["up"]) @ layer["down"]


def decoder(attend: Attend) -> Forward:
    """Pre-norm blocks around somebody's attention."""

    def model(params: Params, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        for layer in params["layers"]:
            x = x + attend(layer, rms_norm(x, layer["norm1"]))
            x = x + mlp(layer, rms_norm(x, layer["norm2"]))
        return rms_norm(x, params["norm"]) @ params["unembed"]

    return model


def split_heads(x: jax.Array) -> jax.Array:
    """[b, t, h * d] to [b, t, h, d]."""
    return x.reshape(*x.shape[:-1], -1, HEAD_DIM)


def projected(layer: Params, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [b, t, h, d], keys and values [b, t, kv heads, d]."""
    return split_heads(x @ layer["wq"]), split_heads(x @ layer["wk"]), split_heads(x @ layer["wv"])


def merged(layer: Params, heads: jax.Array) -> jax.Array:
    """[b, t, h, d] through the output projection to [b, t, width]."""
    return heads.reshape(*heads.shape[:2], -1) @ layer["wo"]
