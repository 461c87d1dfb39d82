"""A zoo of authorings: ways in which people write decoders, and look-alikes that must be refused.

Test data for the tracer, the recognition of attention, and the derivation of the KV cache. Each is a plain
forward over whole sequences, tiny, with random weights that make attention peaked.
"""

from tests.variants import (
    attention,
    blocks,
    experts,
    latent,
    libraries,
    masks,
    met,
    models,
    positions,
    refused,
    softmax,
    stacked,
)
from tests.variants.base import Variant, as_function, forward

DECODERS: tuple[Variant, ...] = (
    *libraries.DECODERS,
    *stacked.DECODERS,
    *attention.DECODERS,
    *softmax.DECODERS,
    *masks.DECODERS,
    *positions.DECODERS,
    *blocks.DECODERS,
    *experts.DECODERS,
    *latent.DECODERS,
    *models.DECODERS,
    *met.DECODERS,
)
REFUSED: tuple[Variant, ...] = (*refused.REFUSED, *experts.REFUSED, *softmax.REFUSED, *masks.REFUSED)

__all__ = ["DECODERS", "REFUSED", "Variant", "as_function", "forward"]
