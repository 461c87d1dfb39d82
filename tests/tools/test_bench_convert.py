"""Conversion is streamed: memory and time of a file of 300 MB, measured in a process of its own."""

import json
import subprocess
import sys

import pytest

MIDDLE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 65536,
          "num_attention_heads": 16, "num_key_value_heads": 8}  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_conversion_takes_little_memory_and_the_time_of_its_parts():
    command = [sys.executable, "-m", "xlathe.tools.bench_convert", json.dumps(MIDDLE)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["source"] > 250e6
    assert 0 < found["peak"] <= 4 * found["largest"] + 500e6
    assert found["converting"] <= 2 * (found["copying"] + found["encoding"])
