"""Mixture of experts: routers that choose a few feed-forwards for each token, and the layer around them.

Every expert is a module of its own, so that its weights have names of their own, as in the files
(`layers/3/feed_forward/experts/7/gate/kernel`). Tokens are sorted by expert and multiplied group by group
(MegaBlocks, https://arxiv.org/abs/2211.15841): no token is dropped, and none sees another.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from xlathe.errors import CheckpointError
from xlathe.models.layers import Activation, GatedFeedForward, linear


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many of how many experts a token gets.

    normalized: whether their weights are divided by their sum. scale: what the weights are multiplied by.
    """

    experts: int
    chosen: int
    normalized: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.chosen > self.experts:
            raise CheckpointError(f"config.json: a token gets {self.chosen} experts, but there are {self.experts}")


class SoftmaxRouter(nnx.Module):
    """The most probable experts, weighted by their probabilities: Mixtral, https://arxiv.org/abs/2401.04088, Qwen 3.

    Normalized, they are the softmax of the chosen logits alone.
    """

    def __init__(self, width: int, choice: Choice, *, rngs: nnx.Rngs) -> None:
        self.choice = choice
        self.gate = linear(width, choice.experts, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns float32 weights and int32 experts [n, chosen] of tokens [n, width]."""
        probabilities = jax.nn.softmax(self.gate(x).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(probabilities, self.choice.chosen)
        return _weighed(weights, self.choice), experts


class GroupedSigmoidRouter(nnx.Module):
    """The experts of the best groups, https://arxiv.org/abs/2412.19437, section 2.1.2.

    A score is a sigmoid. Experts are chosen by score plus `correction`, a number an expert that balances the load, and
    weighted by score. A group's score is the sum of its two best; of `groups` groups only `kept` are chosen from.
    """

    def __init__(self, width: int, choice: Choice, groups: int, kept: int, *, rngs: nnx.Rngs) -> None:
        self.choice, self.groups, self.kept = choice, groups, kept
        self.gate = linear(width, choice.experts, rngs)
        self.correction = nnx.Param(jnp.zeros(choice.experts, jnp.float32))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns float32 weights and int32 experts [n, chosen] of tokens [n, width]."""
        logits = jnp.dot(x.astype(jnp.float32), self.gate.kernel[...].astype(jnp.float32))
        scores = jax.nn.sigmoid(logits)
        corrected = self._in_best_groups(scores + self.correction[...].astype(jnp.float32))
        experts = jax.lax.top_k(corrected, self.choice.chosen)[1]
        return _weighed(jnp.take_along_axis(scores, experts, axis=-1), self.choice), experts

    def _in_best_groups(self, scores: jax.Array) -> jax.Array:
        """Returns scores [n, experts] where those of other groups are -inf."""
        grouped = scores.reshape(scores.shape[0], self.groups, -1)
        best = jax.lax.top_k(jax.lax.top_k(grouped, 2)[0].sum(axis=-1), self.kept)[1]
        is_best = jax.nn.one_hot(best, self.groups).sum(axis=-2) > 0
        return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(scores.shape)


def _weighed(weights: jax.Array, choice: Choice) -> jax.Array:
    shares = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20) if choice.normalized else weights
    return shares * choice.scale


class SparseFeedForward(nnx.Module):
    """The weighted sum of the experts that the router chooses for each token, and of one that all tokens pass.

    hidden: sizes of an expert's hidden layer; shared: of the one for all tokens, which is missing where it is None.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        router: SoftmaxRouter | GroupedSigmoidRouter,
        activation: Activation = jax.nn.silu,
        *,
        shared: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.router, self.activation = router, activation
        count = router.choice.experts
        self.experts = nnx.List([GatedFeedForward(width, hidden, activation, rngs=rngs) for _ in range(count)])
        self.shared = None if shared is None else GatedFeedForward(width, shared, activation, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        weights, experts = self.router(flat)
        chosen, count = experts.reshape(-1), experts.shape[-1]
        order = jnp.argsort(chosen)
        rows = self._of_experts(flat[order // count], jnp.bincount(chosen, length=len(self.experts)))
        back = rows[jnp.argsort(order)].reshape(-1, count, x.shape[-1])
        mixed = jnp.einsum("nkd,nk->nd", back, weights.astype(x.dtype)).reshape(x.shape)
        return mixed if self.shared is None else mixed + self.shared(x)

    def _of_experts(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Returns each expert's output for its rows, of which it has sizes[expert]."""
        gate = grouped_product(rows, [expert.gate for expert in self.experts], sizes)
        up = grouped_product(rows, [expert.up for expert in self.experts], sizes)
        return grouped_product(self.activation(gate) * up, [expert.down for expert in self.experts], sizes)


def grouped_product(rows: jax.Array, projections: Sequence[nnx.Linear], sizes: jax.Array) -> jax.Array:
    """Multiplies the first sizes[0] rows [n, inputs] with the first projection, and so on: [n, outputs]."""
    return jax.lax.ragged_dot(rows, jnp.stack([each.kernel[...] for each in projections]), sizes)
