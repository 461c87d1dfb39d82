"""High-level operations, one file each: an operation exists because a kernel, a cache or a quantizer consumes it."""

from xlathe.op import Op
from xlathe.ops.attention import attention
from xlathe.ops.cached_attention import cached_attention
from xlathe.ops.quantized_dot import quantized_dot
from xlathe.ops.quantized_ragged_dot import quantized_ragged_dot
from xlathe.ops.write_slots import write_slots

OPS: tuple[Op, ...] = (attention, cached_attention, quantized_dot, quantized_ragged_dot, write_slots)
