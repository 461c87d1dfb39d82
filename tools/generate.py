"""`xlathe generate`: streams a completion to the standard output."""

from absl import flags

from xlathe.tools.command import Options, Verb
from xlathe.tools.sampling import define_sampling
from xlathe.tools.source import open_program


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("max_tokens", 64, "the most tokens to generate", flag_values=values)
    define_sampling(values)


def run(options: Options, source: str, prompt: str) -> None:
    for piece in open_program(source).stream(prompt, **options):
        print(piece.text, end="", flush=True)
    print()


VERB = Verb(
    "generate",
    "complete a prompt by a bundle, a checkpoint, a graph directory or the demo",
    ("SOURCE", "PROMPT"),
    define,
    run,
)
