"""Layers behind a transformation: scanned in three libraries, and rematerialized in three."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from tests.variants.attention import heads_first
from tests.variants.base import (
    LAYERS,
    VOCAB,
    WIDTH,
    Params,
    Variant,
    decoder,
    decoder_params,
    init_linen,
    init_nnx,
    mlp,
    rms_norm,
)
from tests.variants.libraries import LinenBlock, LinenDecoder, NnxBlock, NnxDecoder
from tests.variants.masks import masked_attention, window_and_global


class NnxScanned(nnx.Module):
    """Blocks made by `nnx.vmap`, with weights stacked on axis 0, and applied by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> NnxBlock:
            return NnxBlock(rngs)

        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = stack(rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        mask = nnx.make_causal_mask(tokens)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x: jax.Array, block: NnxBlock) -> jax.Array:
            return block(x, mask)

        return self.head(self.norm(through(self.embed(tokens), self.blocks)))


def nnx_unstacked() -> NnxDecoder:
    """The weights of `NnxScanned` in a Python loop."""
    scanned, plain = init_nnx(NnxScanned, 80), init_nnx(NnxDecoder, 0)
    graphdef, stacked = nnx.split(scanned.blocks)
    blocks = [nnx.merge(graphdef, jax.tree.map(lambda w, i=i: w[i], stacked)) for i in range(LAYERS)]
    plain.embed, plain.norm, plain.head = scanned.embed, scanned.norm, scanned.head
    plain.blocks = nnx.List(blocks)
    return plain


class NnxRemat(NnxDecoder):
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x, mask = self.embed(tokens), nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = nnx.remat(NnxBlock.__call__)(block, x, mask)
        return self.head(self.norm(x))


class LinenCarry(linen.Module):
    """A block in the form that `linen.scan` wants."""

    @linen.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        return LinenBlock(name="block")(x, mask), None


class LinenScanned(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = linen.Embed(VOCAB, WIDTH)(tokens)
        layers = linen.scan(
            linen.remat(LinenCarry, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=linen.broadcast,
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, linen.make_causal_mask(tokens))
        return linen.Dense(VOCAB, use_bias=False)(linen.LayerNorm()(x))


def linen_unstacked() -> tuple[linen.Module, Params]:
    """The weights of `LinenScanned` in a Python loop."""
    params = dict(init_linen(LinenScanned(), 82)[1]["params"])
    stacked: Any = params.pop("layers")["block"]
    for i in range(LAYERS):
        params[f"block_{i}"] = jax.tree.map(lambda w, i=i: w[i], stacked)
    return LinenDecoder(), {"params": params}


def stack_layers(params: Params) -> Params:
    return params | {"layers": jax.tree.map(lambda *w: jnp.stack(w), *params["layers"])}


def scanned(params: Params, tokens: jax.Array) -> jax.Array:
    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        x = x + heads_first(layer, rms_norm(x, layer["norm1"]))
        return x + mlp(layer, rms_norm(x, layer["norm2"])), None

    x, _ = jax.lax.scan(block, params["embed"][tokens], params["layers"])
    return rms_norm(x, params["norm"]) @ params["unembed"]


def scanned_window_and_global(params: Params, tokens: jax.Array) -> jax.Array:
    """One body for two kinds of layers: a flag that is scanned over selects the mask."""
    distance = jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])

    def block(x: jax.Array, scanned_over: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        layer, is_local = scanned_over
        mask = (distance >= 0) & jnp.where(is_local, distance < 8, True)
        x = x + masked_attention(layer, rms_norm(x, layer["norm1"]), mask)
        return x + mlp(layer, rms_norm(x, layer["norm2"])), None

    is_local = jnp.arange(LAYERS) % 2 == 0
    x, _ = jax.lax.scan(block, params["embed"][tokens], (params["layers"], is_local))
    return rms_norm(x, params["norm"]) @ params["unembed"]


def checkpointed(params: Params, tokens: jax.Array) -> jax.Array:
    @jax.checkpoint
    def block(layer: Params, x: jax.Array) -> jax.Array:
        x = x + heads_first(layer, rms_norm(x, layer["norm1"]))
        return x + mlp(layer, rms_norm(x, layer["norm2"]))

    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = block(layer, x)
    return rms_norm(x, params["norm"]) @ params["unembed"]


DECODERS = (
    Variant("nnx_scan", lambda: init_nnx(NnxScanned, 80), twin=nnx_unstacked),
    Variant("nnx_remat", lambda: init_nnx(NnxRemat, 81), twin=lambda: init_nnx(NnxDecoder, 81)),
    Variant("linen_scan_remat", lambda: init_linen(LinenScanned(), 82), twin=linen_unstacked),
    Variant(
        "lax_scan",
        lambda: (scanned, stack_layers(decoder_params(83))),
        twin=lambda: (decoder(heads_first), decoder_params(83)),
    ),
    Variant(
        "lax_scan_window_and_global",
        lambda: (scanned_window_and_global, stack_layers(decoder_params(84))),
        twin=lambda: (window_and_global, decoder_params(84)),
    ),
    Variant(
        "checkpoint",
        lambda: (checkpointed, decoder_params(85)),
        twin=lambda: (decoder(heads_first), decoder_params(85)),
    ),
)
