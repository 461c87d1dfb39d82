"""Settings of every test."""

import os

import pytest

# Before JAX is imported: the tests are about the CPU, also on machines that have an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_modifyitems(items: list) -> None:
    """With `--dist loadgroup` one process runs all tests of a decoder of the zoo, and traces it once."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        decoder = parameters.get("variant", parameters.get("name"))
        if decoder is not None:
            item.add_marker(pytest.mark.xdist_group(str(decoder)))
