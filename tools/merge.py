"""`xlathe merge`: several checkpoints become one, by a recipe in mergekit's YAML."""

from pathlib import Path

from absl import flags

from xlathe.tools.command import Options, Verb
from xlathe.tools.console import byte_bar, make_console


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("seed", 0, "of what methods draw by chance", flag_values=values)


def run(options: Options, recipe: str, destination: str) -> None:
    from xlathe.errors import CheckpointError
    from xlathe.models.formats.checkpoints import open_adapted
    from xlathe.models.formats.convert import write_directory
    from xlathe.passes.merge.merge import merge, peak_bytes
    from xlathe.passes.merge.recipe import read_recipe

    console, folder, read = make_console(), Path(destination), read_recipe(Path(recipe))
    for model in (part for name in read.models for part in (name, *name.rsplit("+", 1))):
        if folder.exists() and Path(model).exists() and folder.resolve() == Path(model).resolve():
            raise CheckpointError(f"{folder}: expected another place than {model}'s, which is read while writing")
    merged = merge(read, {model: open_adapted(model) for model in read.models}, options["seed"])
    console.print(
        f"{read.method} of {', '.join(read.models)}: {len(merged.tensors)} tensors; about "
        f"{peak_bytes(read, merged) / 1e6:,.0f} MB are held beside the mapped files",
        soft_wrap=True,
    )
    with byte_bar(console, "merge") as progress:
        written = write_directory(merged, folder, progress)
    console.print(f"{destination}: {written:,} bytes of numbers", soft_wrap=True)


VERB = Verb("merge", "merge checkpoints into a directory, by a recipe in YAML", ("RECIPE", "OUT"), define, run)
