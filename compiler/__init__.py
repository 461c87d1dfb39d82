"""xlathe: shapes a JAX model with passes and compiles it ahead of time into a serving binary."""

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
    "RequestError",
    "TraceError",
    "XlatheError",
    "load_graph",
    "op",
    "trace",
]
