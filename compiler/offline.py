"""The real GPU and TPU compilers on a machine that has neither device."""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from xlathe.errors import OptionError, XlatheError
from xlathe.target import Target

_PACKAGES = {"tpu": ("libtpu", "xlathe[tpu]"), "cuda": ("jax_cuda13_plugin", "xlathe[gpu]")}

# There is no device to time the candidates on.
_OPTIONS = {"cuda": {"xla_gpu_autotune_level": "0"}}


def compiler_is_installed(target: Target) -> bool:
    """Says whether `compile_for` can compile for a target here."""
    return target.platform in _PACKAGES and importlib.util.find_spec(_PACKAGES[target.platform][0]) is not None


def compile_for(
    target: Target, function: Any, *avals: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles a function of arrays for one device of a target. The result has a memory plan and cannot run here.

    avals: pytrees of anything with shape and dtype. donate_argnums: arguments whose memory the results may take.

    Raises:
      OptionError: the target is this machine's own processor.
      XlatheError: the compiler of the target is not installed.
    """
    if target.platform not in _PACKAGES:
        raise OptionError(f"{target.name} needs no compiler of another machine")
    if not compiler_is_installed(target):
        extra = _PACKAGES[target.platform][1]
        raise XlatheError(f"compiling for {target.name} needs its compiler: pip install '{extra}'")
    there = SingleDeviceSharding(_device(target))
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), avals)
    return jax.jit(function, donate_argnums=donate_argnums).lower(*placed).compile(_OPTIONS.get(target.platform))


def _device(target: Target) -> Any:
    if target.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu waits for a cloud machine's metadata server
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
