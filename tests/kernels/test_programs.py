"""Serving programs for accelerators, made on a machine that has none."""

from collections.abc import Callable
from pathlib import Path

import pytest

import xlathe as xl
from tests.kernels.plans import target_here
from tests.kernels.programs import CONFIG, SCHEMES, chosen_for, programs, step
from xlathe.bundle_check import read_manifest
from xlathe.errors import OptionError, XlatheError
from xlathe.exported import export_unit
from xlathe.offline import compile_for, compiler_is_installed
from xlathe.target import TARGETS, find_target

NAMES = [target.name for target in TARGETS if target.chip is not None]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_of_a_decode_step_is_a_kernel(name: str, scheme: str) -> None:
    record = chosen_for(name, scheme)
    assert record.hits == {"quantized_dot: kernel": 7 * CONFIG.layers, "cached_attention: kernel": CONFIG.layers}
    assert not record.notes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["tpu-v5e", "h100"])
def test_programs_compile(name: str, scheme: str, note: Callable[[str], None]) -> None:
    target = target_here(name)
    for unit in programs(name, scheme)[-2:]:  # of 2 rows
        avals = unit.signature.avals
        plan = compile_for(target, unit.function, *avals, donate_argnums=(len(avals) - 1,)).memory_analysis()
        assert plan.alias_size_in_bytes > 0  # the cache is updated where it is
        note(
            f"{unit.signature.name} {name}, {scheme}: {plan.argument_size_in_bytes:,} bytes of arguments, "
            f"{plan.temp_size_in_bytes:,} of temporaries"
        )


@pytest.mark.parametrize("name", ["tpu-v5e", "h100"])
def test_a_compiled_program_has_its_compilers_memory_plan(name: str, tmp_path: Path) -> None:
    target_here(name)
    program = xl.compile(step("int8"), max_batch=2, max_len=128, chunks=(16,), unit=8, target=name)
    plan = program.memory
    assert plan.temporaries is not None and plan.fits
    assert plan.temporaries >= 2 * 4 * CONFIG.vocab  # logits of two rows
    program.save(tmp_path / "bundle")
    assert read_manifest(tmp_path / "bundle").custom_calls


@pytest.mark.parametrize(("name", "call"), [("tpu-v5e", "tpu_custom_call"), ("h100", "mosaic_gpu_v2")])
def test_programs_are_exported_without_a_compiler(name: str, call: str) -> None:
    decode = programs(name, "int8")[0]
    exported = export_unit(decode, find_target(name).platform)
    assert f"@{call}(" in exported.mlir_module()
    assert [a.shape for a in exported.in_avals][-1] == decode.signature.avals[-1][-1].shape


def test_what_needs_no_compiler_or_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="cpu needs no compiler of another machine"):
        compile_for(find_target("cpu"), abs, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not compiler_is_installed(find_target("h100"))
    with pytest.raises(XlatheError, match=r"h100 needs its compiler: pip install 'xlathe\[gpu\]'"):
        compile_for(find_target("h100"), abs, 1)
