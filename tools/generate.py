"""`xlathe generate`: streams a completion to the standard output."""

from absl import flags

from xlathe.tools.command import Options, Verb
from xlathe.tools.source import open_program


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("max_tokens", 64, "the most tokens to generate", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "sample among so many likeliest tokens; 0 is all", flag_values=values)
    flags.DEFINE_float(
        "top_p", 1.0, "sample among the likeliest with this share together", flag_values=values
    )
    flags.DEFINE_float(
        "min_p", 0.0, "drop what is less likely than this share of the likeliest", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "equal seeds give equal text", flag_values=values)
    flags.DEFINE_multi_string(
        "stop", [], "a string that ends the text; may be given again", flag_values=values
    )


def run(options: Options, source: str, prompt: str) -> None:
    for piece in open_program(source).stream(prompt, **options):
        print(piece.text, end="", flush=True)
    print()


VERB = Verb(
    "generate",
    "complete a prompt by a bundle, a graph directory or the demo",
    ("SOURCE", "PROMPT"),
    define,
    run,
)
