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
# What an older JAX is tested with: all that goes through libraries or scans, and one of each other kind.
FEW = frozenset(
    variant.name
    for kind in (
        libraries.DECODERS,
        stacked.DECODERS,
        *(module.DECODERS[:1] for module in (attention, softmax, masks, positions, blocks, experts, latent, models)),
        *(module.REFUSED[:1] for module in (refused, experts, softmax, masks)),
    )
    for variant in kind
)

__all__ = ["DECODERS", "FEW", "REFUSED", "Variant", "as_function", "forward"]
