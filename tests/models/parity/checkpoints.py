"""The checkpoints that parity is checked with: one a case, made of its numbers, and those of a folder of fixtures."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.models.parity.cases import Case, Family
from tests.models.parity.values import checkpoint
from xlathe.models.checkpoint import Tensor
from xlathe.safetensors_file import write_safetensors

EXPECTED = Path(__file__).parent / "expected"
FIXTURES = "XLATHE_FIXTURES"  # names a folder with one checkpoint and one expected.safetensors a family
BESIDE = Path(__file__).parents[3].parent / "shared" / "fixtures" / "hf"


@dataclasses.dataclass(frozen=True)
class Expected:
    """What transformers computed: prompts int32 [b, t], logits [b, t, vocab], and what follows row 0, int32 [n]."""

    prompts: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray


@functools.cache
def read_expected(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns arrays and metadata of a file that transformers' numbers lie in."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def expected_of(family: Family, case: Case) -> Expected:
    prompts, logits, greedy = (arrays_of(family, case)[what] for what in ("input_ids", "logits", "greedy"))
    return Expected(prompts, logits, greedy[0])


def arrays_of(family: Family, case: Case) -> dict[str, np.ndarray]:
    arrays, _ = read_expected(EXPECTED / f"{family.model_type}.safetensors")
    prefix = f"{case.name}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def write_case(family: Family, case: Case, folder: Path) -> None:
    """Writes the directory that transformers read, with our writer."""
    _, metadata = read_expected(EXPECTED / f"{family.model_type}.safetensors")
    shapes = json.loads(metadata["shapes"])[case.name]
    arrays = checkpoint(f"{family.model_type}/{case.name}", shapes, case.embedding)
    (folder / "config.json").write_text(json.dumps(family.config(case)))
    write_safetensors(folder / "model.safetensors", {name: _tensor(array) for name, array in arrays.items()})


def _tensor(array: np.ndarray) -> Tensor:
    def read() -> Any:
        return array

    return Tensor(array.shape, array.dtype, read)


def fixtures() -> list[Path]:
    """Returns the checkpoints of decoders in the folder of fixtures; none where there is no folder."""
    folder = Path(os.environ[FIXTURES]) if FIXTURES in os.environ else BESIDE
    found = sorted(path.parent for path in folder.glob("*/expected.safetensors")) if folder.is_dir() else []
    return [path for path in found if "greedy" in read_expected(path / "expected.safetensors")[0]]


def expected_of_fixture(folder: Path) -> Expected:
    """A fixture's greedy tokens begin with the prompt of row 0."""
    arrays, _ = read_expected(folder / "expected.safetensors")
    return Expected(arrays["input_ids"], arrays["logits"], arrays["greedy"][0, arrays["input_ids"].shape[1] :])
