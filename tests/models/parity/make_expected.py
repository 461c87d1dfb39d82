"""Write what transformers computes for each case of `cases.py`. Run by hand; the tests read what it wrote.

    python3.11 -m venv /tmp/hf
    /tmp/hf/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors numpy
    /tmp/hf/bin/python -m tests.models.parity.make_expected [MODEL_TYPE ...]    # in the root of the repository

One file a family, `expected/<model_type>.safetensors`: for each case input_ids int32 [2, 20], logits float32
[2, 20, vocab], greedy int32 [1, 12] (what follows row 0); of an encoder attention_mask and token_type_ids int32
[2, 20] and, as logits, its last hidden state [2, 20, width]; and in its metadata the versions and the names and shapes
of the checkpoint's tensors. Eager attention, float32, CPU, no cache.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.models.parity.cases import ENCODERS, FAMILIES, Case, Family
from tests.models.parity.values import checkpoint

EXPECTED = Path(__file__).parent / "expected"
ROWS, LENGTH, NEW = 2, 20, 12
CLEAR = 0.02  # how far, in shares of the largest logit, a greedy token leads
PROMPTS = 200  # tried


def main() -> None:
    chosen = [family for family in FAMILIES if family.model_type in sys.argv[1:] or len(sys.argv) == 1]
    EXPECTED.mkdir(exist_ok=True)
    for family in chosen:
        write(family)


def write(family: Family) -> None:
    arrays, shapes = {}, {}
    for case in family.cases:
        found, shapes[case.name] = expected(family, case)
        arrays |= {f"{case.name}.{name}": array for name, array in found.items()}
        print(family.model_type, case.name, found.get("greedy", np.empty(0)).tolist(), flush=True)
    metadata = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "shapes": json.dumps(shapes, separators=(",", ":")),
    }
    save_file(arrays, EXPECTED / f"{family.model_type}.safetensors", metadata)


def expected(family: Family, case: Case) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(family.config(case)))
        loader = AutoModel if family in ENCODERS else AutoModelForCausalLM
        shapes = saved_shapes(path, loader)
        name = f"{family.model_type}/{case.name}"
        save_file(checkpoint(name, shapes, case.embedding), path / "model.safetensors", {"format": "pt"})
        model, report = loader.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    assert not any(report.values()), f"{name}: {report}"
    if family in ENCODERS:
        return encode(model.eval()), shapes
    for seed in range(PROMPTS):
        prompt = np.random.RandomState(seed).randint(0, model.config.vocab_size, (ROWS, LENGTH))
        if (found := run(model.eval(), prompt)) is not None:
            return found, shapes
    raise AssertionError(f"{name}: no prompt whose greedy tokens are clear")


def saved_shapes(path: Path, loader: type) -> dict[str, list[int]]:
    """Returns the tensors that a checkpoint of this configuration has on disk, which are not those in memory."""
    with tempfile.TemporaryDirectory() as other:
        loader.from_config(AutoConfig.from_pretrained(path)).save_pretrained(other)
        with safe_open(Path(other) / "model.safetensors", "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def encode(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns inputs and last hidden state of an encoder; the second row is padded."""
    ids = np.random.RandomState(0).randint(0, model.config.vocab_size, (ROWS, LENGTH))
    arrays = {
        "input_ids": ids,
        "attention_mask": (np.arange(LENGTH) < np.asarray([[LENGTH], [LENGTH - 7]])).astype(np.int64),
        "token_type_ids": ids % 2,
    }
    hidden = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).last_hidden_state
    return {name: array.astype(np.int32) for name, array in arrays.items()} | {"logits": hidden.numpy()}


@torch.no_grad()
def run(model: torch.nn.Module, prompt: np.ndarray) -> dict[str, np.ndarray] | None:
    """Returns inputs and outputs, or None where a greedy token has a close rival or all are one token."""
    logits = model(torch.from_numpy(prompt), use_cache=False).logits
    text = torch.from_numpy(prompt[:1])
    for _ in range(NEW):
        last = model(text, use_cache=False).logits[0, -1]
        first, second = last.topk(2).values
        if first - second < CLEAR * last.abs().max():
            return None
        text = torch.cat([text, last.argmax()[None, None]], dim=1)
    greedy = text[:, LENGTH:]
    if len(set(greedy[0].tolist())) < 3:
        return None
    arrays = {"input_ids": prompt.astype(np.int32), "logits": logits.float().numpy(), "greedy": greedy.numpy()}
    return {name: np.ascontiguousarray(a.astype(np.int32) if name != "logits" else a) for name, a in arrays.items()}


if __name__ == "__main__":
    main()
