"""llama.cpp's mixes of types as passes on a graph: the bytes that a file of that type would have, served."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from xlathe.graph import Graph
    from xlathe.passes import Quantize
    from xlathe.pipeline import Pipeline

AS_IT_IS: Final = "F32"


def mix_pass(graph: "Graph", type: str) -> "Quantize":
    """Returns the pass that gives each weight the type that `xlathe convert --type` would.

    graph: one that `xlathe.models.export.to_checkpoint` takes. Raises CheckpointError where it does not, OptionError
    for an unknown type.
    """
    from xlathe.models.export import source_names, to_checkpoint
    from xlathe.models.formats.gguf import plan_gguf
    from xlathe.passes import Quantize
    from xlathe.passes.quantize.plan import rules_of
    from xlathe.passes.quantize.schemes import Scheme

    ours = source_names(graph)
    schemes: dict[str, Scheme] = {}
    checkpoint = to_checkpoint(graph.replace(tokenizer=None))  # which a file might have no words for
    for tensor in plan_gguf(checkpoint, type).tensors:
        if tensor.type.name != AS_IT_IS:
            scheme = Scheme.parse(tensor.type.name.lower())
            schemes |= {ours[source]: scheme for source in tensor.plan.sources}
    return Quantize(rules=rules_of(schemes))


def find_mix(name: str, graph: "Graph") -> "Pipeline":
    """Returns the pipeline of a preset, or of one of llama.cpp's mixes, whose names are in capitals."""
    from xlathe.passes import Canonicalize, FuseAttention
    from xlathe.pipeline import Pipeline
    from xlathe.tools.source import preset

    if not name[0].isupper():
        return preset(name)
    return Pipeline([Canonicalize(), FuseAttention(), mix_pass(graph, name)])
