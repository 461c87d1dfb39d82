"""The sizes that the configurations of most decoders name alike."""

import dataclasses
import functools
from collections.abc import Callable

from flax import nnx

from xlathe.models.layers import ACTIVATIONS, Activation, Heads
from xlathe.models.settings import Settings


@dataclasses.dataclass(frozen=True)
class Sizes:
    """vocab: logits a token; width: of the residual stream; hidden: of the feed-forward; tied: as in `Decoder`."""

    vocab: int
    width: int
    layers: int
    hidden: int
    heads: Heads
    norm_epsilon: float
    tied: bool

    @staticmethod
    def read(settings: Settings, *, tied: bool = False) -> "Sizes":
        """Reads a `config.json`; tied: what holds where it does not say. Raises CheckpointError."""
        width, queries = settings.size("hidden_size"), settings.size("num_attention_heads")
        keys_values = settings.size("num_key_value_heads", queries)
        if not settings.has("head_dim") and width < queries:
            raise settings.wrong("num_attention_heads", f"at most hidden_size, {width}", queries)
        if queries % keys_values:
            raise settings.wrong("num_key_value_heads", f"a divisor of {queries} heads", keys_values)
        return Sizes(
            vocab=settings.size("vocab_size"),
            width=width,
            layers=settings.size("num_hidden_layers"),
            hidden=settings.size("intermediate_size"),
            heads=Heads(queries, keys_values, settings.size("head_dim", width // queries)),
            norm_epsilon=settings.positive("rms_norm_eps", 1e-6),
            tied=settings.flag("tie_word_embeddings", tied),
        )

    def rms_norm(self, rngs: nnx.Rngs) -> Callable[[], nnx.RMSNorm]:
        """Makes the norms of the residual stream: https://arxiv.org/abs/1910.07467."""
        return functools.partial(nnx.RMSNorm, self.width, epsilon=self.norm_epsilon, rngs=rngs)

    def head_norm(self, rngs: nnx.Rngs) -> Callable[[], nnx.RMSNorm]:
        """Makes the norms over the channels of a head."""
        return functools.partial(nnx.RMSNorm, self.heads.dim, epsilon=self.norm_epsilon, rngs=rngs)


def read_activation(settings: Settings, name: str = "hidden_act", default: str = "silu") -> Activation:
    return ACTIVATIONS[settings.one_of(name, ACTIVATIONS, default)]


def read_windows(settings: Settings, layers: int, slides: Callable[[int], bool]) -> list[int | None]:
    """Returns the window of each layer, None for one that sees all: by `layer_types`, or by `slides` without it."""
    if not settings.has("layer_types"):
        return [settings.size("sliding_window") if slides(i) else None for i in range(layers)]
    kinds = settings.values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise settings.wrong("layer_types", f"a list of {layers} kinds", kinds)
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise settings.wrong("layer_types", "full_attention or sliding_attention", kind)
    return [settings.size("sliding_window") if kind == "sliding_attention" else None for kind in kinds]


def read_upper_windows(settings: Settings, layers: int) -> list[int | None]:
    """Returns the window of each layer as Qwen says it: `max_window_layers` lower layers see all."""
    if not settings.flag("use_sliding_window", False):
        return [None] * layers
    lower = settings.count("max_window_layers", 28)
    return read_windows(settings, layers, lambda index: index >= lower)
