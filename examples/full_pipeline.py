"""Every stage in one script: trace, fuse, prune, quantize, derive and lay out the cache, compile, speculate, save.

    JAX_PLATFORMS=cpu python examples/full_pipeline.py [OUT]

It takes the demo's model and writes a bundle to OUT (default build/full_pipeline). Where the compilers of a TPU or a
GPU are installed (`make test-kernels` does it) the same graph is compiled for them too, without the devices; else
their memory plans leave out what only a compiler knows.
"""

import sys
from pathlib import Path

import numpy as np

import xlathe as xl
from xlathe import passes
from xlathe.models import demo

CONTEXT = 256
PROMPT = """\
import os
import sys


def read_file(path):
    with open(path) as file:
        return file.read()


def"""


def main(out: str) -> None:
    model, tokenizer = demo.load("target")
    graph = xl.trace(model, max_len=CONTEXT, tokenizer=tokenizer)
    sample = np.asarray(tokenizer.encode(Path(__file__).read_text()).ids[: 2 * CONTEXT], np.int32).reshape(2, -1)

    pipeline = xl.Pipeline(
        [
            passes.Canonicalize(),
            passes.FuseAttention(),
            passes.PruneStructured(neurons=0.1, heads=0.25, score="activation"),
            passes.Quantize("int4", group=32),
            passes.KVCache(),
            passes.CacheLayout("paged", page=16, dtype="int8"),
        ],
        expect={"attention": 6},
    )
    small = pipeline(graph, calibration=[sample])
    print(small.report())

    program = xl.compile(small, max_len=CONTEXT, draft="ngram", gamma=4)
    program.save(out)
    loaded = xl.load(out)
    (completion,) = loaded.generate(PROMPT, max_tokens=48)
    (plain,) = xl.compile(small, max_len=CONTEXT).generate(PROMPT, max_tokens=48)
    assert completion.tokens == plain.tokens, "speculation changed the text"
    print(f"\n{PROMPT}{completion.text}\n\n{completion.stats}\n")
    for name in ("h100", "tpu-v5e"):
        print(xl.compile(small, max_len=CONTEXT, chunks=(16,), target=name).memory.to_text(), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "build/full_pipeline")
