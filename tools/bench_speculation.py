"""How fast the demo's model decodes with and without drafts: `python -m xlathe.tools.bench_speculation`.

It completes held-out files, one row at a time. All ways take turns on each prompt, so that a disturbance of the machine
meets them alike.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from xlathe.graph import Graph
from xlathe.models import demo
from xlathe.program import Program, Stats, compile
from xlathe.tools.console import bar
from xlathe.tools.demo import held_out_windows
from xlathe.tools.source import DEMO, DEMO_LENGTH, preset, stop_tokens
from xlathe.tools.stages import machine
from xlathe.trace import trace

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "float32", "preset of the pipeline of target and draft")
flags.DEFINE_float("temperature", 0.0, "0 is greedy")
flags.DEFINE_integer("prompts", 12, "held-out files to complete")
flags.DEFINE_integer("new_tokens", 128, "length of a completion")
flags.DEFINE_multi_integer("gamma", [2, 4], "tokens drafted at once")

PROMPT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Way:
    """A program, and what it told of each completion."""

    name: str
    program: Program
    runs: list[Stats]

    @property
    def speeds(self) -> np.ndarray:
        """Tokens a second of each completion."""
        return np.array([run.new_tokens / run.decode_seconds for run in self.runs])

    @property
    def acceptance(self) -> np.ndarray:
        """Mean over completions, by place."""
        return np.mean([run.acceptance for run in self.runs], axis=0)


def ways(target: Graph, draft: Graph) -> list[Way]:
    """Compiles plain decoding, and each drafter with each gamma."""
    drafters: list[tuple[str, dict[str, Any]]] = [("plain", {})]
    drafters += [(f"draft model, gamma {g}", {"draft": draft, "gamma": g}) for g in FLAGS.gamma]
    drafters += [(f"n-gram, gamma {g}", {"draft": "ngram", "gamma": g}) for g in FLAGS.gamma]
    stops = stop_tokens(DEMO)
    return [Way(name, compile(target, stop_tokens=stops, **options), []) for name, options in drafters]


def measure(compiled: Sequence[Way], console: Console) -> int:
    """Times every way on every prompt; returns how many of its completions differ from those of the first."""
    options = {"max_tokens": FLAGS.new_tokens, "temperature": FLAGS.temperature}
    prompts = held_out_windows(FLAGS.prompts * DEMO_LENGTH)[:, :PROMPT_TOKENS].tolist()
    different = 0
    with bar(console, "measure") as progress:
        for way in compiled:  # the first call does not count
            way.program.generate([prompts[0]], **options)
        for i, prompt in enumerate(prompts):
            progress("measure", i / len(prompts))
            found = [way.program.generate([prompt], **options)[0] for way in compiled]
            different += sum(completion.tokens != found[0].tokens for completion in found)
            for way, completion in zip(compiled, found, strict=True):
                way.runs.append(completion.stats)
    return different


def table(compiled: Sequence[Way]) -> Table:
    """Medians over completions; the ratio is that of the speeds on the same prompt."""
    result = Table("", "tokens/s", "/ plain", "tokens\na step", "acceptance by place")
    for way in compiled:
        result.add_row(
            way.name,
            f"{np.median(way.speeds):.0f}",
            f"{np.median(way.speeds / compiled[0].speeds):.2f}",
            f"{np.mean([run.tokens_per_step for run in way.runs]):.2f}",
            " ".join(f"{share:.2f}" for share in way.acceptance) if way is not compiled[0] else "",
        )
    return result


def main(_: Sequence[str]) -> None:
    console = Console()
    loaded = map(demo.load, ("target", "draft"))
    graphs = [trace(model, max_len=DEMO_LENGTH, tokenizer=tokenizer) for model, tokenizer in loaded]
    with bar(console, "compile"):
        compiled = ways(*map(preset(FLAGS.config), graphs))
    different = measure(compiled, console)
    console.print(machine())
    console.print(
        f"{FLAGS.config} target and draft, temperature {FLAGS.temperature}: {FLAGS.prompts} prompts of "
        f"{PROMPT_TOKENS} tokens, {FLAGS.new_tokens} new ones; {different} completions differ from the plain ones"
    )
    console.print(table(compiled))


if __name__ == "__main__":
    app.run(main)
