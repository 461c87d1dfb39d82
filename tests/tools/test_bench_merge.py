"""Merges are streamed: memory of a merge of three files of 180 MB, in a process of its own."""

import sys
from pathlib import Path

import pytest

from xlathe.tools.bench_merge import SHAPE, measure

MIDDLE = SHAPE | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 32768,
                  "num_attention_heads": 16, "num_key_value_heads": 8}  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_merge_holds_few_tensors(tmp_path: Path) -> None:
    (found,) = measure(MIDDLE, tmp_path, None, ["ties"])
    assert (found.method, found.by) == ("ties", "xlathe") and found.seconds > 0
    assert 0 < found.peak <= found.allowed == 4 * 32768 * 1024 * 2 + 500_000_000
