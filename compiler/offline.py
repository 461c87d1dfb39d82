"""The real GPU and TPU compilers on a machine that has neither device."""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax import export
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from xlathe.aot import Buckets, units
from xlathe.decode.speculative import Speculation
from xlathe.errors import OptionError, XlatheError
from xlathe.graph import Graph
from xlathe.memory import MemoryPlan, plan_from_graph
from xlathe.target import Target, find_device

_PACKAGES = {"tpu": ("libtpu", "xlathe[tpu]"), "cuda": ("jax_cuda13_plugin", "xlathe[gpu]")}

# There is no device to time the candidates on.
_OPTIONS = {"cuda": {"xla_gpu_autotune_level": "0"}}


def compiler_is_installed(target: Target) -> bool:
    """Says whether `compile_for` can compile for a target here."""
    return target.platform in _PACKAGES and importlib.util.find_spec(_PACKAGES[target.platform][0]) is not None


def how_to_install(target: Target) -> str:
    """Returns the command that installs the compiler of an accelerator."""
    return f"pip install '{_PACKAGES[target.platform][1]}'"


def target_here() -> Target:
    """Returns the target that this process runs on; raises OptionError where it is none of them."""
    platform, kind = export.default_export_platform(), jax.devices()[0].device_kind
    target = find_device(platform, kind)
    if target is None:
        raise OptionError(f"this machine has a {kind} ({platform}), which is no target: name one, target='cpu' for one")
    return target


def runs_here(target: Target) -> bool:
    """Says whether this process has a device of the target's kind, for which its kernels are written."""
    here = find_device(export.default_export_platform(), jax.devices()[0].device_kind)
    return here is not None and here.name == target.name


def compile_for(
    target: Target, function: Any, *avals: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles a function of arrays for one device of a target. The result has a memory plan and cannot run here.

    avals: pytrees of anything with shape and dtype. donate_argnums: arguments whose memory the results may take.

    Raises:
      OptionError: the target is this machine's own processor.
      XlatheError: the compiler of the target is not installed, or refuses the program (too large, for one).
    """
    if target.platform not in _PACKAGES:
        raise OptionError(f"{target.name} needs no compiler of another machine")
    if not compiler_is_installed(target):
        raise XlatheError(f"compiling for {target.name} needs its compiler: {how_to_install(target)}")
    there = SingleDeviceSharding(_device(target))
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), avals)
    try:
        return jax.jit(function, donate_argnums=donate_argnums).lower(*placed).compile(_OPTIONS.get(target.platform))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise XlatheError(f"the compiler of {target.name} refuses a program: {reason}") from error


def _device(target: Target) -> Any:
    if target.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu waits for a cloud machine's metadata server
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock guards devices, and none is opened
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices[0]
    return topologies.get_topology_desc(
        platform="cuda", topology_name=target.topology, topology="1x1x1", target_config=_sm90(target)
    ).devices[0]


def _sm90(target: Target) -> str:
    """XLA's description of a Hopper GPU, in the text form of its GpuTargetConfigProto."""
    assert target.chip is not None
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: 233472
          shared_memory_per_block_optin: {target.chip.on_chip}
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(target.chip.bandwidth)} device_memory_size: {target.chip.memory}
          l2_cache_size: 52428800 cuda_compute_capability {{ major: 9 }}
        }}
        runtime_version: {{ major: 13 }}
        dnn_version_info {{ major: 9 minor: 12 }}
        platform_name: "CUDA" device_description_str: "{target.topology}"
    """


def plan_for(
    step: Graph,
    buckets: Buckets,
    target: Target,
    speculation: Speculation | None = None,
    *,
    memory: int | None = None,
) -> MemoryPlan:
    """Plans the memory of programs on a machine that is not here; weights may be shapes without values.

    memory: bytes of the device, where the target does not say or says something else.

    Temporaries are those of the target's real compiler, which compiles every program; where it is not installed, or
    weights and cache alone do not fit, they are left unknown. Raises XlatheError where it refuses a program.
    """
    plan = plan_from_graph(step, buckets, target, speculation)
    plan = plan if memory is None else dataclasses.replace(plan, memory=memory)
    if target.platform not in _PACKAGES:
        return dataclasses.replace(plan, unknown="known on the machine that compiles the programs")
    if not compiler_is_installed(target):
        return dataclasses.replace(plan, unknown=f"not known without the compiler: {how_to_install(target)}")
    if not plan.fits:
        return dataclasses.replace(plan, unknown="not compiled: weights and cache alone do not fit")
    every = units(step, buckets, target.name, speculation=speculation)
    return plan.with_temporaries(
        (u.signature, compile_for(target, u.function, *u.signature.avals, donate_argnums=(len(u.signature.avals) - 1,)))
        for u in every
    )
