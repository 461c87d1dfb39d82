"""Rotary position embeddings and the ways in which a pretrained model's frequencies are stretched.

RoPE: https://arxiv.org/abs/2104.09864. The scalings follow Hugging Face's `rope_parameters` (before version 5
`rope_theta` and `rope_scaling`): linear (position interpolation, https://arxiv.org/abs/2306.15595), dynamic, llama3,
yarn (https://arxiv.org/abs/2309.00071) and longrope (https://arxiv.org/abs/2402.13753, first called su).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xlathe.models.settings import Settings


@dataclasses.dataclass(frozen=True)
class Rope:
    """The angle of channel pair i at position p is p * frequencies[i].

    frequencies: one a pair of rotated channels; the channels after these are not rotated.
    magnitude: what the rotated channels are multiplied by (yarn, longrope).
    interleaved: whether pair i is the channels 2 i and 2 i + 1, rather than i and i + pairs.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    interleaved: bool = False

    @staticmethod
    def plain(head_dim: int, theta: float) -> "Rope":
        return Rope(tuple(_inverse(head_dim, theta)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rotates `x` [b, t, heads, head_dim] by position."""
        pairs = len(self.frequencies)
        position = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None]
        angle = position * jnp.asarray(self.frequencies, jnp.float32)  # [t, 1, pairs]
        cos, sin = ((f(angle) * self.magnitude).astype(x.dtype) for f in (jnp.cos, jnp.sin))
        rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if self.interleaved:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., :pairs], rotated[..., pairs:]
        turned = [first * cos - second * sin, second * cos + first * sin]
        joined = jnp.stack(turned, -1).reshape(rotated.shape) if self.interleaved else jnp.concatenate(turned, -1)
        return joined if pairs * 2 == x.shape[-1] else jnp.concatenate([joined, rest], axis=-1)


def _inverse(dim: int, theta: float) -> np.ndarray:
    """Returns theta ** (-2 i / dim) in float64, which one rounding to float32 follows."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def read_rope(settings: Settings, head_dim: int, max_len: int, layer_type: str | None = None) -> Rope:
    """Returns the rotary embedding that a configuration describes.

    head_dim: the channels of a head, of which `partial_rotary_factor` may rotate a part.
    max_len: the longest text to serve: longrope has other factors beyond the length that it was first trained with.
    layer_type: which entry to read where full and sliding layers have their own.
    Raises CheckpointError for a type of scaling that is not known.
    """
    found = _parameters(settings, layer_type)
    kind = found.one_of("rope_type", _SCALINGS, "default")
    share = found.positive("partial_rotary_factor", settings.positive("partial_rotary_factor", 1.0))
    if share > 1:
        raise settings.wrong("partial_rotary_factor", "a share of at most 1", share)
    dim = int(head_dim * share)
    theta = found.positive("rope_theta", settings.positive("rope_theta", 10_000.0))
    frequencies, magnitude = _SCALINGS[kind](_inverse(dim, theta), theta, found, settings, max_len)
    return Rope(tuple(map(float, frequencies)), magnitude)


def _parameters(settings: Settings, layer_type: str | None) -> Settings:
    """Returns `rope_parameters` (of the layer type), or `rope_scaling` of older files with their `type`."""
    name = "rope_parameters" if settings.has("rope_parameters") else "rope_scaling"
    if settings.has("rope_scaling") and settings.values["rope_scaling"] != settings.values[name]:
        raise settings.wrong("rope_scaling", "what rope_parameters says, or nothing", settings.values["rope_scaling"])
    if not settings.has(name):
        return Settings({}, settings.where)
    found = settings.within(name)
    if layer_type is not None and found.has(layer_type):
        return found.within(layer_type)
    old: dict[str, Any] = {"rope_type": found.values["type"]} if found.has("type") else {}
    return Settings({**old, **found.values}, found.where)


Scaled = tuple[np.ndarray, float]


def _default(base: np.ndarray, theta: float, found: Settings, settings: Settings, max_len: int) -> Scaled:
    return base, 1.0


def _linear(base: np.ndarray, theta: float, found: Settings, settings: Settings, max_len: int) -> Scaled:
    return base / found.positive("factor"), 1.0


def _dynamic(base: np.ndarray, theta: float, found: Settings, settings: Settings, max_len: int) -> Scaled:
    """Stretches by the length of a text longer than `max_position_embeddings` alone, and such ones are not served."""
    found.positive("factor")
    return base, 1.0


def _trained(found: Settings, settings: Settings) -> int:
    """Returns the length of text that the unscaled frequencies were trained with."""
    name = "original_max_position_embeddings"
    return settings.size(name, found.size(name, settings.size("max_position_embeddings")))


def _llama3(base: np.ndarray, theta: float, found: Settings, settings: Settings, max_len: int) -> Scaled:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    factor = found.positive("factor")
    low, high = found.positive("low_freq_factor"), found.positive("high_freq_factor")
    turns = _trained(found, settings) * base / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return base * (blend + (1 - blend) / factor), 1.0


def _yarn(base: np.ndarray, theta: float, found: Settings, settings: Settings, max_len: int) -> Scaled:
    factor, dim, trained = found.positive("factor"), 2 * base.size, _trained(found, settings)

    def channel(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(found.positive("beta_fast", 32.0)), channel(found.positive("beta_slow", 1.0))
    if found.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    stretched = np.clip((np.arange(base.size) - low) / max(high - low, 0.001), 0, 1)
    return base * (1 - stretched + stretched / factor), _yarn_magnitude(found, factor)


def _yarn_magnitude(found: Settings, factor: float) -> float:
    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if found.has("attention_factor"):
        return found.positive("attention_factor")
    if found.has("mscale") and found.has("mscale_all_dim") and found.values["mscale_all_dim"]:
        return grown(found.number("mscale")) / grown(found.number("mscale_all_dim"))
    return grown(1.0)


def _longrope(base: np.ndarray, theta: float, found: Settings, settings: Settings, max_len: int) -> Scaled:
    """Each channel has a factor of its own: one list for texts as long as trained with first, one for longer ones."""
    trained = _trained(found, settings)
    name = "long_factor" if max_len > trained else "short_factor"
    factors = np.asarray(found.numbers(name))
    if factors.shape != base.shape:
        raise found.wrong(name, f"{base.size} numbers", factors.size)
    stretch = found.positive("factor", settings.size("max_position_embeddings") / trained)
    grown = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    return base / factors, found.positive("attention_factor", grown)


_SCALINGS: Mapping[str, Callable[[np.ndarray, float, Settings, Settings, int], Scaled]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
