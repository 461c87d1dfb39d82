"""Settings of every test."""

import gc
import os
from pathlib import Path

import pytest

# Before JAX is imported: the tests are about the CPU, also on machines that have an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time, and what is compiled is small and runs a few times.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()

MAPPINGS = Path("/proc/self/maps")
MOST = 30_000  # of the 65,530 that Linux allows a process; XLA needs a dozen for each program that is compiled

SURFACE = "tests/test_jax_surface.py"  # every fact counts, on every JAX


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` one process runs all tests of a decoder of the zoo, or of a file whose tests share.

    `breadth` are all decoders of the zoo but a few, and all cases of another test but the first.
    """
    from tests.graphs import ZOO
    from tests.variants import FEW

    seen = set()
    for item in items:
        file, _, name = item.nodeid.partition("::")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        decoder = str(parameters.get("variant", parameters.get("name")))
        if decoder in ZOO:
            item.add_marker(pytest.mark.xdist_group(decoder))
        elif any(fixture[-1].scope == "module" for fixture in item._fixtureinfo.name2fixturedefs.values()):
            item.add_marker(pytest.mark.xdist_group(file))
        test = file, name.partition("[")[0]
        if decoder not in FEW if decoder in ZOO else test in seen and file != SURFACE:
            item.add_marker(pytest.mark.breadth)
        seen.add(test)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, forgets compiled programs before there are so many that XLA crashes the process."""
    if nextitem is None or nextitem.path == item.path or not MAPPINGS.exists():
        return
    with MAPPINGS.open() as lines:
        count = sum(1 for _ in lines)
    if count > MOST:
        import jax

        jax.clear_caches()
        gc.collect()
