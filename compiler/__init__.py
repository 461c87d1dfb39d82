"""xlathe: shapes a JAX model with passes and compiles it ahead of time into a serving binary."""

from xlathe.bundle import load_bundle as load
from xlathe.errors import (
    BundleError,
    DeriveError,
    GraphFileError,
    OptionError,
    PassError,
    RequestError,
    TraceError,
    XlatheError,
)
from xlathe.graph import Graph
from xlathe.graph_file import load_graph
from xlathe.op import op
from xlathe.pipeline import Pass, Pipeline
from xlathe.program import Program, compile
from xlathe.trace import trace

__all__ = [
    "BundleError",
    "DeriveError",
    "Graph",
    "GraphFileError",
    "OptionError",
    "Pass",
    "PassError",
    "Pipeline",
    "Program",
    "RequestError",
    "TraceError",
    "XlatheError",
    "compile",
    "load",
    "load_graph",
    "op",
    "trace",
]
