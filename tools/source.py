"""What the words of a command line name: graphs, programs and pipelines."""

import importlib
import json
import pkgutil
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from xlathe.errors import OptionError, RequestError, did_you_mean
from xlathe.tools.command import Options, UsageError

if TYPE_CHECKING:
    from xlathe.graph import Graph
    from xlathe.models.llama import LlamaConfig
    from xlathe.pipeline import Pipeline
    from xlathe.program import Program

DEMO = "demo"
DEMO_LENGTH = 512  # xlathe.models.demo.files.CONTEXT, without loading JAX
CALIBRATION_ROWS = 8


def define_pipeline(values: flags.FlagValues) -> None:
    """Adds the flags that `find_pipeline` reads, and those of calibration."""
    flags.DEFINE_string(
        "passes", None, "a pipeline, 'canonicalize,quantize{scheme=int8}'", flag_values=values
    )
    flags.DEFINE_string("config", None, "a pipeline by the name of its preset, int8", flag_values=values)
    define_calibration(values)


def define_calibration(values: flags.FlagValues) -> None:
    """Adds the flags that `xlathe.tools.text.find_calibration` reads."""
    flags.DEFINE_string(
        "calibration", None, "file of the text that passes calibrate on; the demo has its own", flag_values=values
    )
    flags.DEFINE_integer(
        "calibration_rows",
        CALIBRATION_ROWS,
        "the most rows of it, each as long as the model reads at once",
        lower_bound=1,
        flag_values=values,
    )


def find_pipeline(options: Options) -> "Pipeline | None":
    """Returns the pipeline of --passes or --config, None where neither was given."""
    if options["passes"] and options["config"]:
        raise UsageError("--passes and --config both name a pipeline; give one of them")
    if options["config"]:
        return preset(options["config"])
    return parse_passes(options["passes"]) if options["passes"] else None


def preset(name: str) -> "Pipeline":
    """Returns the pipeline of the preset `name`; OptionError for an unknown one."""
    from xlathe import configs

    known = [module.name for module in pkgutil.iter_modules(configs.__path__) if not module.ispkg]
    if name not in known:
        raise OptionError(f"no config {name!r}{did_you_mean(name, known)}")
    return parse_passes(importlib.import_module(f"xlathe.configs.{name}").get_config().passes)


def parse_passes(text: str) -> "Pipeline":
    from xlathe.passes import PASSES
    from xlathe.pipeline import Pipeline

    return Pipeline.parse(text, PASSES)


def open_graph(source: str, *, changing: bool = False, activations: str | None = None) -> "Graph":
    """Traces the demo's target model, loads a graph directory, or opens a checkpoint (a directory, or on the hub).

    changing: whether passes will change the weights: those of a GGUF file are floats then, and its blocks otherwise.
    activations: how those are rounded that a checkpoint's packed weights are multiplied with.
    """
    if source == DEMO:
        return trace_demo("target")
    from xlathe.graph_file import PROGRAM, load_graph
    from xlathe.models.pretrained import from_pretrained

    packed = not (changing and source.endswith(".gguf"))
    if (Path(source) / PROGRAM).exists():
        return load_graph(source)
    return from_pretrained(source, packed=packed, activations=activations)


def trace_demo(name: str) -> "Graph":
    """Traces one of the demo's models, `target`, `draft` or `half`."""
    from xlathe.models import demo
    from xlathe.trace import trace

    model, tokenizer = demo.load(name)
    return trace(model, max_len=DEMO_LENGTH, tokenizer=tokenizer).replace(card=demo.card(name))


def open_shapes(config: str, max_len: int) -> "Graph":
    """Traces a Llama of the sizes in a JSON file (`xlathe.models.llama.LlamaConfig`), its weights but shapes."""
    from flax import nnx

    from xlathe.models.llama import Llama
    from xlathe.trace import trace

    sizes = _sizes(config)
    return trace(nnx.eval_shape(lambda: Llama(sizes, rngs=nnx.Rngs(0))), max_len=max_len)


def _sizes(config: str) -> "LlamaConfig":
    from xlathe.models.llama import LlamaConfig

    try:
        fields = json.loads(Path(config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{config} is no JSON: {error}") from None
    kinds = typing.get_type_hints(LlamaConfig)
    if not isinstance(fields, dict):
        raise OptionError(f"{config}: expected an object with the fields {', '.join(kinds)}")
    for name, value in fields.items():
        if name not in kinds:
            raise OptionError(f"{config}: no field {name!r}{did_you_mean(name, kinds)}")
        if isinstance(value, bool) or not isinstance(value, int | float if kinds[name] is float else int) or value <= 0:
            raise OptionError(f"{config}: {name} must be a positive {kinds[name].__name__}, got {value!r}")
    try:
        return LlamaConfig(**fields)
    except TypeError as error:
        raise OptionError(f"{config}: {str(error).partition(' ')[2]}") from None


def is_bundle(source: str) -> bool:
    return (Path(source) / "manifest.json").exists()


def open_program(source: str, check: "Callable[[Graph | Program], None]" = lambda model: None) -> "Program":
    """Loads the bundle `source`, or compiles the demo, a checkpoint or a graph directory with the default passes.

    check: refuses a model that will not do, before it is compiled.
    """
    if is_bundle(source):
        from xlathe.bundle import load_bundle

        program = load_bundle(source)
        check(program)
        return program
    from xlathe.program import compile

    graph = open_graph(source)
    if graph.tokenizer is None:
        raise RequestError(f"{source} has no tokenizer, so it completes no text; Program.generate takes token ids")
    check(graph)
    return compile(graph)
