"""`xlathe demo`: traces the model that ships with xlathe; shapes, compiles and measures it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from xlathe.errors import OptionError
from xlathe.tools.command import Options, Verb
from xlathe.tools.console import bar, make_console
from xlathe.tools.source import DEMO, DEMO_LENGTH, open_graph, preset, stop_tokens

if TYPE_CHECKING:
    import numpy as np

# Presets of xlathe.configs in the order of the table; the first is what the others are compared with.
PIPELINES = ("float32", "int8")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("prompt", "def read_file(path):", "what is completed", flag_values=values)
    flags.DEFINE_integer("max_tokens", 48, "the most tokens of a completion", flag_values=values)
    flags.DEFINE_integer(
        "eval_tokens", 8192, f"held-out tokens, in windows of {DEMO_LENGTH}", flag_values=values
    )
    flags.DEFINE_string("json", None, "file for the measured figures", flag_values=values)


def run(options: Options) -> None:
    from xlathe.report import count_parameters
    from xlathe.tools.results import quality_table, speed_table, write_json
    from xlathe.tools.stages import Task, machine, run_stages

    start = time.perf_counter()
    console = make_console()
    with bar(console, "read held-out text"):
        windows = held_out_windows(options["eval_tokens"])
    console.print(f"A code model of Python's standard library, on {machine()}", soft_wrap=True)
    with bar(console, "trace"):
        began = time.perf_counter()
        graph = open_graph(DEMO)
        seconds = time.perf_counter() - began
    console.print(
        f"trace: {len(graph.jaxpr.eqns)} equations over tokens {graph.aval('tokens').str_short()}, "
        f"{len(graph.names('weight'))} weights, {count_parameters(graph):,} parameters; {seconds:.1f} s",
        soft_wrap=True,
    )
    task = Task(graph, windows, options["prompt"], options["max_tokens"], stop_tokens(DEMO))
    results, conditions = run_stages(task, [(name, preset(name)) for name in PIPELINES], console)
    console.print()
    console.print(quality_table(results, conditions), "", speed_table(results, conditions))
    console.print(f"\n{time.perf_counter() - start:.0f} s in all")
    if options["json"]:
        write_json(Path(options["json"]), results, conditions)


def held_out_windows(count: int) -> "np.ndarray":
    """Returns int32 [count // DEMO_LENGTH, DEMO_LENGTH] of held-out text, spread evenly over all of it.

    Raises OptionError for fewer than two windows, and for more than there are.
    """
    import numpy as np

    from xlathe.models import demo
    from xlathe.models.demo import corpus

    texts = corpus.held_out_files()
    tokens = corpus.encode_files(texts, demo.tokenizer()) if texts else np.zeros(0, np.int32)
    rows = tokens[: len(tokens) // DEMO_LENGTH * DEMO_LENGTH].reshape(-1, DEMO_LENGTH)
    wanted = count // DEMO_LENGTH
    if not 2 <= wanted <= len(rows):
        raise OptionError(
            f"--eval_tokens={count}: expected at least {2 * DEMO_LENGTH} and at most {rows.size}, "
            f"the held-out tokens in the library of this Python"
        )
    return rows[np.linspace(0, len(rows) - 1, wanted).astype(int)]


VERB = Verb(
    "demo", "trace, shape, compile, run and measure the model that ships with xlathe", (), define, run
)
