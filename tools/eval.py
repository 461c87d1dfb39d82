"""`xlathe eval`: how well a graph or a bundle predicts a text, and how far it is from another one."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from xlathe.errors import OptionError
from xlathe.tools.command import Options, UsageError, Verb
from xlathe.tools.console import bar, make_console
from xlathe.tools.source import is_bundle, open_graph
from xlathe.tools.text import encode, read_text

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from xlathe.verify import Model


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("text", None, "file of the text that is predicted, in UTF-8", flag_values=values)
    flags.DEFINE_string("reference", None, "graph directory or bundle to compare with", flag_values=values)


def run(options: Options, source: str) -> None:
    from xlathe.tools.measure import bits_per_byte, held_out_loss, perplexity_of, qualities

    if options["text"] is None:
        raise UsageError("which text? --text=FILE")
    console = make_console()
    text = read_text(Path(options["text"]))
    with bar(console, "load"):
        model = open_model(source)
        reference = open_model(options["reference"]) if options["reference"] else None
    tokens, windows = _windows(text, model, reference)
    with bar(console, "evaluate") as progress:
        measured = qualities(reference.predict, [model.predict], windows, progress)[0] if reference else None
        loss = measured.loss if measured else held_out_loss(model.predict, windows, progress)
    lines = [
        f"{source}: {windows.size:,} tokens of {options['text']} in {len(windows)} windows",
        f"perplexity     {perplexity_of(loss)}",
        f"bits a byte    {bits_per_byte(loss, tokens, text)}",
    ]
    if measured:
        lines += [
            f"KL divergence  {measured.kl} nats a token from {options['reference']}",
            f"same top-1     {measured.same_top1}",
        ]
    console.print("\n".join(lines), soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Opened:
    """What predicts, how text becomes its tokens, and the longest row that it takes."""

    source: str
    predict: "Model"
    tokenizer: "Tokenizer | None"
    max_len: int


def open_model(source: str) -> Opened:
    """Opens a bundle, a graph directory or the demo."""
    if is_bundle(source):
        from xlathe.bundle import load_bundle
        from xlathe.tools.forced import Forced

        program = load_bundle(source)
        return Opened(source, Forced(program), program.tokenizer, program.buckets.slots)
    graph = open_graph(source)
    return Opened(source, graph, graph.tokenizer, graph.max_len)


def _windows(text: str, model: Opened, reference: Opened | None) -> tuple[int, "np.ndarray"]:
    """Returns the number of tokens of the text, and int32 [n, length], n >= 2: all but a rest shorter than a window."""
    import numpy as np

    both = [model] if reference is None else [model, reference]
    encoded = [encode(text, each.tokenizer, each.source, "evaluating a text") for each in both]
    if encoded[0] != encoded[-1]:
        raise OptionError(f"the tokenizers of {' and '.join(each.source for each in both)} differ on the text")
    tokens = np.asarray(encoded[0], np.int32)
    length = min(*(each.max_len for each in both), len(tokens) // 2)
    if length < 2:
        raise OptionError(f"the text has {len(tokens)} tokens, expected at least 4")
    return len(tokens), tokens[: len(tokens) // length * length].reshape(-1, length)


VERB = Verb("eval", "perplexity of a bundle, a graph directory or the demo on a text", ("SOURCE",), define, run)
