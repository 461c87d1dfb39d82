"""xlathe: shapes a JAX model with passes and compiles it ahead of time into a serving binary.

Names are imported when they are first used: `import xlathe` alone, and so `xlathe help`, does not wait for JAX.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for people and static tools; at run time `_MODULES` says the same
    from xlathe.bundle import load_bundle as load
    from xlathe.errors import (
        BundleError,
        CheckpointError,
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
    from xlathe.models.pretrained import from_pretrained
    from xlathe.op import op
    from xlathe.pipeline import Pass, Pipeline
    from xlathe.program import Program, compile
    from xlathe.trace import trace

__all__ = [
    "BundleError",
    "CheckpointError",
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
    "from_pretrained",
    "load",
    "load_graph",
    "op",
    "trace",
]

_MODULES = {
    "bundle": {"load": "load_bundle"},
    "graph": {"Graph": "Graph"},
    "graph_file": {"load_graph": "load_graph"},
    "models.pretrained": {"from_pretrained": "from_pretrained"},
    "op": {"op": "op"},
    "pipeline": {"Pass": "Pass", "Pipeline": "Pipeline"},
    "program": {"Program": "Program", "compile": "compile"},
    "trace": {"trace": "trace"},
    "errors": {name: name for name in __all__ if name.endswith("Error")},
}
_HOMES = {public: (module, name) for module, names in _MODULES.items() for public, name in names.items()}


class _Package(types.ModuleType):
    """A package whose public names are imported when they are used (PEP 562, and why it is not enough below)."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, original = _HOMES[name]
        value = getattr(importlib.import_module(f"{self.__name__}.{module}"), original)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets each submodule on its package, where `trace` and `op` are functions.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
