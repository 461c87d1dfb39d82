"""`xlathe convert`: writes a checkpoint in another file format, or its numbers in another type."""

from absl import flags

from xlathe.tools.command import Options, Verb
from xlathe.tools.console import byte_bar, make_console


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "type",
        None,
        "of the numbers: F32, F16, BF16, or Q8_0 in a GGUF file; by default Q8_0 there, the source's in a directory",
        flag_values=values,
    )


def run(options: Options, source: str, destination: str) -> None:
    from xlathe.models.formats.convert import convert

    console = make_console()
    with byte_bar(console, "convert") as progress:
        written = convert(source, destination, options["type"], progress)
    console.print(f"{destination}: {written:,} bytes of numbers", soft_wrap=True)


VERB = Verb(
    "convert",
    "write a checkpoint, a GGUF file or a Hugging Face directory, as a .gguf file or a directory",
    ("SOURCE", "OUT"),
    define,
    run,
)
