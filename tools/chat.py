"""`xlathe chat`: a conversation, its questions from the standard input and its answers streamed to the output."""

import sys
from typing import TYPE_CHECKING

from absl import flags

from xlathe.tools.command import Options, Verb
from xlathe.tools.sampling import define_sampling
from xlathe.tools.source import open_program

if TYPE_CHECKING:
    from xlathe.graph import Graph
    from xlathe.program import Program

Turn = dict[str, str]


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("system", None, "what the model is told before the conversation", flag_values=values)
    flags.DEFINE_integer(
        "max_tokens", None, "the most tokens of an answer; default: what the length leaves", flag_values=values
    )
    define_sampling(values)


def run(options: Options, source: str) -> None:
    """Ctrl-C ends an answer, and at a question the conversation, as the end of the input does."""
    from xlathe.chat import render_chat

    sampling = dict(options)
    system = sampling.pop("system")
    turns = [] if system is None else [{"role": "system", "content": system}]

    def takes_messages(model: "Graph | Program") -> None:
        render_chat(model.card, model.tokenizer, [*turns, {"role": "user", "content": "?"}])

    program = open_program(source, takes_messages)
    while (question := _ask()) is not None:
        if question:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": _answer(program, turns, sampling)})


def _ask() -> str | None:
    """Returns the next line; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(program: "Program", turns: list[Turn], sampling: Options) -> str:
    """Prints an answer as it comes; returns it, or its part before Ctrl-C."""
    answer = ""
    try:
        for piece in program.stream_chat(turns, **sampling):
            answer += piece.text or ""
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return answer


VERB = Verb("chat", "talk with a bundle, a checkpoint or a graph that has a chat template", ("SOURCE",), define, run)
