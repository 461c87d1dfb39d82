"""Settings of every test."""

import os

import pytest

# Before JAX is imported: the tests are about the CPU, also on machines that have an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time, and what is compiled is small and runs a few times.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` one process runs all tests of a decoder of the zoo, or of a file whose tests share.

    Decoders of the zoo but a few are `breadth`.
    """
    from tests.graphs import ZOO
    from tests.variants import FEW

    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        decoder = str(parameters.get("variant", parameters.get("name")))
        if decoder in ZOO:
            item.add_marker(pytest.mark.xdist_group(decoder))
            if decoder not in FEW:
                item.add_marker(pytest.mark.breadth)
        elif any(fixture[-1].scope == "module" for fixture in item._fixtureinfo.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
