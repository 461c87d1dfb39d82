"""Settings of every test."""

import os

# Before JAX is imported: the tests are about the CPU, also on machines that have an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
