"""`xlathe eval`: how well a model predicts a text, and how far it is from another one."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from xlathe.errors import OptionError
from xlathe.tools.command import Options, UsageError, Verb, output_file
from xlathe.tools.console import bar, make_console
from xlathe.tools.protocol import LLAMA_CPP, PROTOCOLS, Protocol, beginning, cut, find_protocol
from xlathe.tools.source import is_bundle, open_graph
from xlathe.tools.text import encode, read_text

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from xlathe.tools.quality import Quality
    from xlathe.tools.scores import Progress
    from xlathe.verify import Estimate, Model


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("text", None, "file of the text that is predicted, in UTF-8", flag_values=values)
    flags.DEFINE_string(
        "reference", None, "what to compare with: the demo, a checkpoint, a graph or a bundle", flag_values=values
    )
    define_protocol(values)
    flags.DEFINE_string("json", None, "file for the figures", flag_values=values)


def define_protocol(values: flags.FlagValues) -> None:
    """Adds the flags that say how a text is evaluated."""
    names = " or ".join(each.name for each in PROTOCOLS)
    flags.DEFINE_string("protocol", LLAMA_CPP.name, f"how a text is evaluated: {names}", flag_values=values)
    flags.DEFINE_integer("context", None, "tokens of a window; the protocol's own by default", flag_values=values)


def run(options: Options, source: str) -> None:
    if options["text"] is None:
        raise UsageError("which text? --text=FILE")
    protocol, console, file = find_protocol(options["protocol"]), make_console(), output_file(options, "json")
    text = read_text(Path(options["text"]), "text")
    with bar(console, "load"):
        model = open_model(source)
        reference = open_model(options["reference"]) if options["reference"] else None
    tokens, windows = _windows(text, protocol, options["context"], model, reference)
    with bar(console, "evaluate") as progress:
        loss, quality = _measure(model, reference, windows, protocol, progress)
    figures = _figures(loss, quality, tokens / len(text.encode()))
    lines = [
        f"{source}: {windows.size:,} tokens of {options['text']} in {len(windows)} windows",
        protocol.describe(windows.shape[1]),
        f"perplexity     {figures['perplexity']}",
        f"bits a byte    {figures['bits_per_byte']}",
        *(_beside(quality, options["reference"]) if quality else []),
    ]
    console.print("\n".join(lines), soft_wrap=True)
    if file is not None:
        length = windows.shape[1]
        told: dict[str, Any] = {
            "source": source,
            "reference": options["reference"],
            "text": options["text"],
            "protocol": dataclasses.asdict(protocol) | {"context": length},
            "windows": len(windows),
            "scored": len(windows) * (length - 1 - protocol.first(length)),
            **{name: dataclasses.asdict(figure) for name, figure in figures.items()},
        }
        file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _measure(
    model: "Opened", reference: "Opened | None", windows: "np.ndarray", protocol: Protocol, progress: "Progress"
) -> "tuple[Estimate, Quality | None]":
    """Returns the loss, and how the model differs from the reference if there is one."""
    from xlathe.tools.quality import mean_of, summarize
    from xlathe.tools.scores import compare, score

    first = protocol.first(windows.shape[1])
    if reference is None:
        scores = score(model.predict, windows, first, progress, model.rows)
        return mean_of(scores.loss, protocol.clustered), None
    rows = min(model.rows, reference.rows)
    quality = summarize(
        compare(reference.predict, [model.predict], windows, first, progress, rows)[0], protocol.clustered
    )
    return quality.loss, quality


def _figures(loss: "Estimate", quality: "Quality | None", tokens_per_byte: float) -> "dict[str, Estimate]":
    from xlathe.tools.quality import bits_per_byte, perplexity_of

    own = {"loss": loss, "perplexity": perplexity_of(loss), "bits_per_byte": bits_per_byte(loss, tokens_per_byte)}
    others = {field.name: getattr(quality, field.name) for field in dataclasses.fields(quality)} if quality else {}
    return own | others


def _beside(quality: "Quality", reference: str) -> list[str]:
    return [
        f"reference      perplexity {quality.base_perplexity}, of {reference}",
        f"log ratio      {quality.log_ratio} of the perplexities",
        f"KL divergence  {quality.kl} nats a token",
        f"  median       {quality.kl_median}",
        f"  99 %         {quality.kl_tail}",
        f"same top-1     {_percent(quality.same_top1)}",
        f"delta p        {_percent(quality.delta_p)}",
        f"  RMS          {_percent(quality.delta_p_rms)}",
    ]


def _percent(share: "Estimate") -> str:
    return f"{dataclasses.replace(share, mean=100 * share.mean, error=100 * share.error)} %"


@dataclasses.dataclass(frozen=True)
class Opened:
    """What predicts, how text becomes its tokens, the longest row that it takes, and how many at a time."""

    source: str
    predict: "Model"
    tokenizer: "Tokenizer | None"
    max_len: int
    rows: int


def open_model(source: str) -> Opened:
    """Opens a bundle, a graph directory, a checkpoint or the demo."""
    from xlathe.tools.scores import ROWS

    if is_bundle(source):
        from xlathe.bundle import load_bundle
        from xlathe.tools.forced import Forced

        program = load_bundle(source)
        return Opened(source, Forced(program), program.tokenizer, program.buckets.slots, rows=1)
    graph = open_graph(source)
    return Opened(source, graph, graph.tokenizer, graph.max_len, ROWS)


def _windows(
    text: str, protocol: Protocol, context: int | None, model: Opened, reference: Opened | None
) -> tuple[int, "np.ndarray"]:
    """Returns the number of tokens of the text, and its windows."""
    both = [model] if reference is None else [model, reference]
    encoded = [
        (encode(text, each.tokenizer, each.source, "evaluating a text"), beginning(each.tokenizer)) for each in both
    ]
    if encoded[0] != encoded[-1]:
        raise OptionError(f"the tokenizers of {' and '.join(each.source for each in both)} differ on the text")
    tokens, begin = encoded[0]
    return len(tokens), cut(protocol, tokens, begin, min(each.max_len for each in both), context)


VERB = Verb(
    "eval", "perplexity of a model on a text, and how far it is from another one", ("SOURCE",), define, run
)
