"""What a configuration must say of a model that was made smaller: sizes, read off the weights that are left."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xlathe.errors import CheckpointError
from xlathe.models.settings import Settings

Shapes = Mapping[str, tuple[int, ...]]
Change = Callable[[np.ndarray], np.ndarray]


def resize_separate(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    """Sizes of layers with separate projections for queries, keys and values, and for gate and up."""
    return stream_size(shapes) | _heads(shapes, settings) | feed_forward_sizes(shapes)


def stream_size(shapes: Shapes) -> dict[str, Any]:
    """Size of the residual stream."""
    return {"hidden_size": shapes["embedding/embedding"][1]}


def feed_forward_sizes(shapes: Shapes) -> dict[str, Any]:
    """Sizes of feed-forward layers, of one for all tokens and of experts, where there are such."""
    places = {"intermediate_size": "feed_forward/gate/kernel", "moe_intermediate_size": "experts/0/gate/kernel"}
    found = {key: [shape[1] for name, shape in shapes.items() if name.endswith(end)] for key, end in places.items()}
    return {key: widths[0] for key, widths in found.items() if widths}


def count_experts(shapes: Shapes, name: str) -> dict[str, Any]:
    """How many experts the router of the first layer that has one chooses from."""
    counts = [shape[1] for ours, shape in shapes.items() if ours.endswith("router/gate/kernel")]
    return {name: counts[0]} if counts else {}


def resize_experts(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    """Sizes of layers whose only feed-forward is of experts (Mixtral)."""
    hidden = feed_forward_sizes(shapes)["moe_intermediate_size"]
    experts = count_experts(shapes, "num_local_experts")
    return stream_size(shapes) | _heads(shapes, settings) | {"intermediate_size": hidden} | experts


def square_sizes(shapes: Shapes, settings: Settings, width: str, heads: str) -> dict[str, Any]:
    """Sizes of the stream and of its attention, where heads share the stream's features among them (GPT-2).

    width, heads: the names of both in config.json. Raises CheckpointError where heads of the size they have do not
    fill the stream.
    """
    dim = settings.size(width) // settings.size(heads)
    features, attended = shapes["embedding/embedding"][1], shapes["layers/0/attention/output/kernel"][0]
    if features != attended:
        raise CheckpointError(
            f"{settings.where}: {width} is {heads} times the size of a head, {dim}: no config.json of this family says "
            f"that {attended} channels of heads are left in a stream of {features}; Graph.save keeps it"
        )
    return {width: features, heads: attended // dim}


def _heads(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    dim = _head_dim(settings)
    return {
        "num_attention_heads": shapes["layers/0/attention/query/kernel"][1] // dim,
        "num_key_value_heads": shapes["layers/0/attention/key/kernel"][1] // dim,
        "head_dim": dim,
    }


def resize_fused(shapes: Shapes, settings: Settings) -> dict[str, Any]:
    """Sizes of layers whose projections are fused (Phi-3)."""
    dim = _head_dim(settings)
    queries = shapes["layers/0/attention/output/kernel"][0] // dim
    return stream_size(shapes) | {
        "intermediate_size": shapes["layers/0/feed_forward/down/kernel"][0],
        "num_attention_heads": queries,
        "num_key_value_heads": (shapes["layers/0/attention/fused/kernel"][1] // dim - queries) // 2,
        "head_dim": dim,
    }


def change_nothing(shapes: Shapes, settings: Settings) -> dict[str, Change]:
    """What holds where no constant of a forward follows from a size."""
    return {}


def head_channels(settings: Settings) -> tuple[int, int]:
    """How many channels a head's keys and its values have."""
    if settings.has("v_head_dim"):
        keys = settings.size("qk_nope_head_dim") + settings.size("qk_rope_head_dim")
        return keys, settings.size("v_head_dim")
    old = settings.has("n_embd")  # GPT-2
    dim = settings.size("n_embd") // settings.size("n_head") if old else _head_dim(settings)
    return dim, dim


def _head_dim(settings: Settings) -> int:
    return settings.size("head_dim", settings.size("hidden_size") // settings.size("num_attention_heads"))


def drop_layers(settings: Settings, kept: list[int], indexed: tuple[str, ...]) -> dict[str, Any]:
    """The changes that leave only some layers: their number, and the list of their kinds.

    indexed: the settings by which a layer's form follows from its index. Raises CheckpointError where one of them is
    in force and no list says what each layer is.
    """
    changes: dict[str, Any] = {"n_layer" if settings.has("n_layer") else "num_hidden_layers": len(kept)}
    if settings.has("layer_types"):
        kinds = settings.values["layer_types"]
        return changes | {"layer_types": [kinds[i] for i in kept]}
    ruling = [name for name in indexed if settings.values.get(name)]
    if ruling and kept != list(range(len(kept))):
        raise CheckpointError(
            f"{settings.where}: {ruling[0]} gives a layer its form by its index, so no configuration can say that only "
            f"the layers {kept} are left; Graph.save keeps such a graph"
        )
    return changes
