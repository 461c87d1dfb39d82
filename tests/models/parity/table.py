"""The table of what is checked of each family. `python -m tests.models.parity.table --update` writes it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from tests.models.formats.families import CONFIGS
from tests.models.parity.cases import ENCODERS, FAMILIES, WINDOW, Case, Family

README = Path(__file__).parents[3] / "models" / "README.md"
BEGIN, END = "<!-- parity: begin -->\n", "<!-- parity: end -->"
Check = Literal["logits", "chunks", "greedy tokens", "ring", "bundle"]
# On the checkpoints of tests/models/formats/configs: test_families.py of gguf and of tools, test_llama_cpp.py.
OF_FILES = ("GGUF", "verbs", "llama.cpp")


def checked(check: Check, family: Family, case: Case) -> bool:
    """Says whether a case takes part; what is expensive is checked on one case a family."""
    if family in ENCODERS:
        return check == "logits"
    if check == "ring":
        windowed = [c for c in family.cases if has_window(family, c)]
        return case in windowed[:1]
    return case is family.cases[0] if check in ("greedy tokens", "bundle") else True


def has_window(family: Family, case: Case) -> bool:
    config = family.config(case)
    used = config.get("use_sliding_window", not family.model_type.startswith("qwen"))
    return bool(used) and config.get("sliding_window") == WINDOW


def table(families: Sequence[Family]) -> str:
    """Returns how many configurations of each family every check runs on."""
    checks = get_args(Check)
    lines = [
        f"| `model_type` | {' | '.join((*checks, *OF_FILES))} | configurations |",
        f"|---|{'---|' * len((*checks, *OF_FILES))}---|",
    ]
    written = [json.loads(path.read_text())["model_type"] for path in CONFIGS.iterdir()]
    for family in families:
        counts = [sum(checked(check, family, case) for case in family.cases) for check in checks]
        counts += [written.count(family.model_type)] * len(OF_FILES)
        names = ", ".join(case.name.replace("_", " ") for case in family.cases)
        lines.append(f"| `{family.model_type}` | {' | '.join(str(n or '') for n in counts)} | {names} |")
    return "\n".join(lines) + "\n"


def in_readme(text: str) -> str:
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    if sys.argv[1:] != ["--update"]:
        print(table(FAMILIES), end="")
        return
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    README.write_text(before + BEGIN + table(FAMILIES) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
