"""Sizes of tiles, which the Pallas kernels share."""


def round_up(size: int, multiple: int) -> int:
    """Returns the least multiple that is not below `size`."""
    return -(-size // multiple) * multiple
