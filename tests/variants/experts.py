"""Ways to send each token to its experts, and ways in which tokens then depend on one another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tests.variants.base import WIDTH, Forward, Params, Variant, rms_norm
from tests.variants.blocks import EXPERTS, causal, routed, top_two, with_experts

CHOSEN = 2
type FeedForward = Callable[[Params, jax.Array], jax.Array]  # (layer, normalized x [b, t, d]) -> [b, t, d]


def sparse(feed_forward: FeedForward) -> Forward:
    """Pre-norm blocks around somebody's experts."""

    def model(params: Params, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        for layer in params["layers"]:
            x = x + causal(layer, rms_norm(x, layer["norm1"]))
            x = x + feed_forward(layer, rms_norm(x, layer["norm2"]))
        return rms_norm(x, params["norm"]) @ params["unembed"]

    return model


def route(layer: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and experts [.., 2] of each token."""
    values, experts = jax.lax.top_k(x @ layer["router"], CHOSEN)
    return jax.nn.softmax(values, axis=-1), experts


def on_sorted(layer: Params, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(jax.nn.silu(jax.lax.ragged_dot(rows, layer["ups"], sizes)), layer["downs"], sizes)


def sorted_and_back(layer: Params, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, WIDTH)
    weights, experts = route(layer, flat)
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen)
    out = on_sorted(layer, flat[order // CHOSEN], jnp.bincount(chosen, length=EXPERTS))
    out = out[jnp.argsort(order)].reshape(-1, CHOSEN, WIDTH)
    return jnp.einsum("nkd,nk->nd", out, weights).reshape(x.shape)


def added_where_they_came_from(layer: Params, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, WIDTH)
    weights, experts = route(layer, flat)
    order = jnp.argsort(experts.ravel(), stable=False)
    token = jnp.repeat(jnp.arange(flat.shape[0]), CHOSEN)[order]
    sizes = jax.nn.one_hot(experts, EXPERTS, dtype=jnp.int32).sum((0, 1))
    out = on_sorted(layer, jnp.take(flat, token, axis=0), sizes) * weights.ravel()[order][:, None]
    return jnp.zeros_like(flat).at[token].add(out).reshape(x.shape)


def repeated_rows(layer: Params, x: jax.Array) -> jax.Array:
    """Rows are repeated and sorted, their weights sorted along, and set where they came from."""
    weights, experts = route(layer, x)
    rows = jnp.repeat(x.reshape(-1, WIDTH), CHOSEN, axis=0)
    slots = jnp.arange(rows.shape[0])
    chosen, order, scales = jax.lax.sort((experts.reshape(-1), slots, weights.reshape(-1)), num_keys=1)
    out = on_sorted(layer, rows[order], jnp.bincount(chosen, length=EXPERTS)) * scales[:, None]
    back = jnp.zeros_like(out).at[order].set(out)
    return back.reshape(*x.shape[:-1], CHOSEN, WIDTH).sum(axis=-2)


def inverse_by_scatter(layer: Params, x: jax.Array) -> jax.Array:
    b, t, _ = x.shape
    weights, experts = route(layer, x)
    order = jnp.argsort(experts.reshape(-1))
    inverse = jnp.zeros(b * t * CHOSEN, jnp.int32).at[order].set(jnp.arange(b * t * CHOSEN))
    sizes = (experts.reshape(-1)[:, None] == jnp.arange(EXPERTS)).sum(axis=0)
    out = on_sorted(layer, x.reshape(b * t, WIDTH)[order // CHOSEN], sizes)
    return (out[inverse.reshape(b, t, CHOSEN)] * weights[..., None]).sum(axis=2)


def one_expert(layer: Params, x: jax.Array) -> jax.Array:
    """Switch: the best expert alone, https://arxiv.org/abs/2101.03961."""
    flat = x.reshape(-1, WIDTH)
    probabilities = jax.nn.softmax(flat @ layer["router"])
    expert = jnp.argmax(probabilities, axis=-1)
    order = jnp.argsort(expert)
    rows = jnp.take_along_axis(flat, order[:, None], axis=0)
    out = on_sorted(layer, rows, jnp.bincount(expert, length=EXPERTS))
    return (out[jnp.argsort(order)] * probabilities.max(axis=-1, keepdims=True)).reshape(x.shape)


def one_expert_plainly(layer: Params, x: jax.Array) -> jax.Array:
    probabilities = jax.nn.softmax(x @ layer["router"])
    gates = jax.nn.one_hot(jnp.argmax(probabilities, axis=-1), EXPERTS) * probabilities
    outputs = jnp.einsum("btef,efd->bted", jax.nn.silu(jnp.einsum("btd,edf->btef", x, layer["ups"])), layer["downs"])
    return jnp.einsum("bted,bte->btd", outputs, gates)


def choice_by_choice(layer: Params, x: jax.Array) -> jax.Array:
    """Tokens are sorted once for each of their choices."""
    flat, total = x.reshape(-1, WIDTH), jnp.zeros_like(x)
    weights, experts = route(layer, x)
    for i in range(CHOSEN):
        chosen = experts[:, :, i].reshape(-1)
        order = jnp.argsort(chosen)
        out = on_sorted(layer, flat[order], jnp.bincount(chosen, length=EXPERTS))
        total += out[jnp.argsort(order)].reshape(x.shape) * weights[:, :, i, None]
    return total


def weights_of_each_token(layer: Params, x: jax.Array) -> jax.Array:
    """The weights of its experts are looked up for every token."""
    weights, experts = route(layer, x)
    hidden = jax.nn.silu(jnp.einsum("btd,btkdf->btkf", x, layer["ups"][experts]))
    return jnp.einsum("btkf,btkfd,btk->btd", hidden, jnp.take(layer["downs"], experts, axis=0), weights)


def expert_by_expert(layer: Params, x: jax.Array) -> jax.Array:
    """A Python loop over the experts, each of which sees all tokens."""
    weights, experts = route(layer, x)
    total = jnp.zeros_like(x)
    for e in range(EXPERTS):
        gate = jnp.where(experts == e, weights, 0.0).sum(axis=-1, keepdims=True)
        total += gate * (jax.nn.silu(x @ layer["ups"][e]) @ layer["downs"][e])
    return total


def stacked_when_used(layer: Params, x: jax.Array) -> jax.Array:
    """Every expert has matrices of its own."""
    stacked = {name: jnp.stack([expert[name] for expert in layer["experts"]]) for name in ("ups", "downs")}
    return sorted_and_back(layer | stacked, x)


def with_separate_experts(seed: int) -> Params:
    params = with_experts(seed)
    for layer in params["layers"]:
        ups, downs = layer.pop("ups"), layer.pop("downs")
        layer["experts"] = [{"ups": up, "downs": down} for up, down in zip(ups, downs, strict=True)]
    return params


def dispatched_to_buffers(layer: Params, x: jax.Array) -> jax.Array:
    """GShard: an expert has room for so many tokens and drops what comes after, https://arxiv.org/abs/2006.16668."""
    room = 3
    weights, experts = route(layer, x)
    mask = jax.nn.one_hot(experts[..., 0], EXPERTS)
    place = jnp.cumsum(mask, axis=1) * mask - 1  # refused
    dispatch = jax.nn.one_hot(place.astype(jnp.int32), room) * mask[..., None]  # [b, t, experts, room]
    buffers = jnp.einsum("btec,btd->becd", dispatch, x)
    hidden = jax.nn.silu(jnp.einsum("becd,edf->becf", buffers, layer["ups"]))
    out = jnp.einsum("becf,efd->becd", hidden, layer["downs"])
    return jnp.einsum("btec,becd->btd", dispatch, out) * weights[..., :1]


def sorted_with_capacity(layer: Params, x: jax.Array) -> jax.Array:
    """Sorted, but an expert's tokens after the third get nothing."""
    flat = x.reshape(-1, WIDTH)
    chosen = jnp.argmax(flat @ layer["router"], axis=-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=EXPERTS)
    first = jnp.cumsum(sizes) - sizes  # refused
    rank = jnp.arange(flat.shape[0]) - first[chosen[order]]
    out = jnp.where(rank[:, None] < 3, on_sorted(layer, flat[order], sizes), 0.0)
    return out[jnp.argsort(order)].reshape(x.shape)


def weighed_by_popularity(layer: Params, x: jax.Array) -> jax.Array:
    _, experts = route(layer, x)
    counts = jax.nn.one_hot(experts, EXPERTS).sum((0, 1, 2))
    share = counts / 10.0
    return x * share[0]  # refused


def put_back_wrongly(layer: Params, x: jax.Array) -> jax.Array:
    """Sorted twice by the same order, instead of sorted and put back."""
    flat = x.reshape(-1, WIDTH)
    chosen = jnp.argmax(flat @ layer["router"], axis=-1)
    order = jnp.argsort(chosen)
    out = on_sorted(layer, flat[order], jnp.bincount(chosen, length=EXPERTS))
    return out[order].reshape(x.shape)  # refused


def left_sorted(layer: Params, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, WIDTH)
    chosen = jnp.argmax(flat @ layer["router"], axis=-1)
    out = on_sorted(layer, flat[jnp.argsort(chosen)], jnp.bincount(chosen, length=EXPERTS))
    return out.reshape(x.shape)  # refused


def groups_of_another_choice(layer: Params, x: jax.Array) -> jax.Array:
    """Rows are sorted by one choice and grouped by another: whose weight a token meets depends on the others."""
    flat = x.reshape(-1, WIDTH)
    order = jnp.argsort(jnp.argmax(flat @ layer["router"], axis=-1))
    sizes = jnp.bincount(jnp.argmax(flat @ layer["router"][:, ::-1], axis=-1), length=EXPERTS)
    out = jax.lax.ragged_dot(flat[order], layer["ups"], sizes)  # refused
    return (out @ layer["downs"][0])[jnp.argsort(order)].reshape(x.shape)


def place_as_number(layer: Params, x: jax.Array) -> jax.Array:
    """Each token learns where it was put."""
    flat = x.reshape(-1, WIDTH)
    order = jnp.argsort(jnp.argmax(flat @ layer["router"], axis=-1))
    place = jnp.argsort(order).astype(x.dtype)
    return (flat * place[:, None]).reshape(x.shape)  # refused


def decodes(author: FeedForward, seed: int = 106, params: Callable[[int], Params] = with_experts) -> Variant:
    twin = one_expert_plainly if author is one_expert else None
    return Variant(
        author.__name__,
        lambda: (sparse(author), params(seed)),
        twin=lambda: (
            sparse(twin) if twin else (lambda p, x: routed(p, x, top_two)),
            with_experts(seed),
        ),
    )


def mixes(author: FeedForward, reason: str, **options: bool) -> Variant:
    return Variant(
        author.__name__,
        lambda: (sparse(author), with_experts(106)),
        layers=0,
        reason=reason,
        author=author,
        **options,
    )


DECODERS = (
    decodes(sorted_and_back),
    decodes(added_where_they_came_from),
    decodes(repeated_rows),
    decodes(inverse_by_scatter),
    decodes(one_expert),
    decodes(choice_by_choice),
    decodes(weights_of_each_token),
    decodes(expert_by_expert),
    decodes(stacked_when_used, params=with_separate_experts),
)

REFUSED = (
    mixes(dispatched_to_buffers, r"cumsum counts .* capacity"),
    mixes(sorted_with_capacity, r"cumsum uses how many tokens chose each expert", causal=False),
    mixes(weighed_by_popularity, r"uses how many tokens chose each expert", causal=False),
    mixes(put_back_wrongly, r"gather puts sorted tokens back in another order", causal=False),
    mixes(left_sorted, r"reshapes across the token axis", causal=False),
    mixes(groups_of_another_choice, r"not sorted by the experts whose counts", causal=False),
    mixes(place_as_number, r"mul uses the places of sorted tokens", causal=False),
)
