"""Programs as portable StableHLO bytes (`jax.export`), and back to functions.

An exported program takes and returns flat lists of arrays, so that the bytes name no type of ours; the trees
follow from its signature.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export

from xlathe import jaxpr as ir
from xlathe.aot import Signature, Unit
from xlathe.errors import BundleError
from xlathe.executable_cache import load_or_compile
from xlathe.kernels import native


def export_unit(unit: Unit, platform: str) -> export.Exported:
    """Lowers a unit for a platform; nothing is compiled. Equal units give equal bytes."""
    avals, tree = jax.tree.flatten(unit.signature.avals)

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(unit.function(*jax.tree.unflatten(tree, leaves)))

    allowed = [export.DisabledSafetyCheck.custom_call(target) for target in native.TARGETS]
    with ir.no_source_lines():  # they would tell where it was built, and change with every caller
        return export.export(jax.jit(flat), platforms=[platform], disabled_checks=allowed)(*avals)


PALLAS_CALLS = frozenset({"tpu_custom_call", "mosaic_gpu_v2"})
"""What calls a kernel written in Pallas, which came with the program."""


def custom_calls(program: export.Exported) -> set[str]:
    """Returns what a program calls kernels by: FFI targets of ours, or those of Pallas."""
    text = program.mlir_module()
    return {target for target in (*native.TARGETS, *PALLAS_CALLS) if f"@{target}(" in text}


def load_program(serialized: bytes, signature: Signature) -> Callable[..., Any]:
    """Returns the program as a function, compiled for this machine; its last argument is updated in place.

    Raises BundleError where the bytes are no program of this signature, or this JAX cannot compile them.
    """
    try:
        program = export.deserialize(bytearray(serialized))
    except Exception as error:  # whatever the parser meets
        raise BundleError(f"JAX {jax.__version__} cannot read it: {_first_line(error)}") from error
    _check_types("arguments", program.in_avals, signature.avals)
    _check_types("results", program.out_avals, signature.results)
    kept = len(program.in_avals) - len(jax.tree.leaves(signature.avals[-1]))
    donated = tuple(range(kept, len(program.in_avals)))

    def compiled() -> jax.stages.Compiled:
        function = jax.jit(program.call, donate_argnums=donated, keep_unused=True)
        return function.lower(*program.in_avals).compile()

    try:
        executable = load_or_compile(hashlib.sha256(serialized).hexdigest(), compiled)
    except Exception as error:  # of the compiler
        raise BundleError(f"JAX {jax.__version__} cannot compile it: {_first_line(error)}") from error
    return _function(executable, jax.tree.structure(signature.results))


def _check_types(what: str, found: Sequence[Any], expected: Any) -> None:
    pairs = [[(tuple(x.shape), x.dtype) for x in side] for side in (found, jax.tree.leaves(expected))]
    if pairs[0] != pairs[1]:
        raise BundleError(f"the {what} of the program differ from what the manifest says")


def _function(executable: Any, results: jax.tree_util.PyTreeDef) -> Callable[..., Any]:
    """Wraps an executable of one device, fresh or from the cache alike."""

    def call(*arguments: Any) -> Any:
        leaves = [x if isinstance(x, jax.Array) else jax.device_put(x) for x in jax.tree.leaves(arguments)]
        shards = executable.execute_sharded(leaves).disassemble_into_single_device_arrays()
        return jax.tree.unflatten(results, [shard[0] for shard in shards])

    return call


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition('\n')[0]}"
