"""How fast the demo's model decodes with and without drafts: `python -m xlathe.tools.bench_speculation`.

It completes held-out files, one row at a time. All ways take turns on each prompt, so that a disturbance of the machine
meets them alike.
"""

from collections.abc import Sequence

from absl import app, flags
from rich.console import Console

from xlathe.graph import Graph
from xlathe.program import Program, compile
from xlathe.tools.console import bar
from xlathe.tools.results import speculation_sheet
from xlathe.tools.source import DEMO_LENGTH, preset, trace_demo
from xlathe.tools.speculation import Drafted, in_turns, judge
from xlathe.tools.stages import machine
from xlathe.tools.text import held_out_windows

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "float32", "preset of the pipeline of target and draft")
flags.DEFINE_float("temperature", 0.0, "0 is greedy")
flags.DEFINE_integer("prompts", 12, "held-out files to complete")
flags.DEFINE_integer("new_tokens", 128, "length of a completion")
flags.DEFINE_multi_integer("gamma", [2, 4], "tokens drafted at once")

PROMPT_TOKENS = 128


def programs(target: Graph, draft: Graph) -> dict[tuple[str, int], Program]:
    """Compiles plain decoding, and each drafter with each gamma."""
    found = {("plain", 0): compile(target)}
    drafters: dict[str, Graph | str] = {"model": draft, "n-gram": "ngram"}
    for name, drafter in drafters.items():
        for gamma in FLAGS.gamma:
            found[name, gamma] = compile(target, draft=drafter, gamma=gamma)
    return found


def measure(compiled: dict[tuple[str, int], Program], console: Console) -> list[Drafted]:
    """Times all of them on every prompt; the first is what others are compared with."""
    prompts = held_out_windows(FLAGS.prompts * DEMO_LENGTH)[:, :PROMPT_TOKENS].tolist()
    options = {"max_tokens": FLAGS.new_tokens, "temperature": FLAGS.temperature}
    with bar(console, "measure") as progress:
        plain, *drafted = in_turns(list(compiled.values()), prompts, progress, **options)
    _, *ways = compiled
    return [judge(FLAGS.config, *way, plain, found) for way, found in zip(ways, drafted, strict=True)]


def main(_: Sequence[str]) -> None:
    console = Console()
    with bar(console, "compile"):
        compiled = programs(*(preset(FLAGS.config)(trace_demo(name)) for name in ("target", "draft")))
    console.print(machine())
    caption = (
        f"temperature {FLAGS.temperature}; {FLAGS.prompts} held-out prompts of {PROMPT_TOKENS} tokens, "
        f"{FLAGS.new_tokens} new ones"
    )
    console.print(speculation_sheet(measure(compiled, console), caption).as_table())


if __name__ == "__main__":
    app.run(main)
