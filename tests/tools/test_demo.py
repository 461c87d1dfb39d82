"""The demo's figures agree with each other and with what is computed apart from it."""

import io
import json

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from xlathe.aot import to_step
from xlathe.errors import OptionError
from xlathe.tools.demo import DEMO_LENGTH, PIPELINES, held_out_windows
from xlathe.tools.measure import over_windows, quality
from xlathe.tools.results import quality_table, speed_table, write_json
from xlathe.tools.source import preset
from xlathe.tools.stages import Task, run_stages

WINDOWS = np.random.default_rng(0).integers(1, 4096, (3, 16), dtype=np.int32)


@pytest.fixture(scope="module")
def run(tiny):
    """Results and conditions of all pipelines, and what was printed on the way."""
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False)
    task = Task(tiny, WINDOWS, prompt="def f", max_tokens=4, stop_tokens=(0,))
    results, conditions = run_stages(task, [(name, preset(name)) for name in PIPELINES], console)
    return results, conditions, console.file.getvalue()


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_float32_differs_in_nothing_from_itself(run):
    result = run[0][0]
    assert result.name == "float32"
    assert (result.quality.kl.mean, result.quality.kl.error) == (0, 0)
    assert (result.quality.same_top1.mean, result.quality.same_top1.error) == (1, 0)
    assert result.bits_per_weight == 32


def test_quality_is_that_of_the_graphs(tiny, run):
    before, after = (log_probabilities(preset(name)(tiny)(WINDOWS)) for name in PIPELINES)

    losses = -np.take_along_axis(after[:, :-1], WINDOWS[:, 1:, None], -1).mean((1, 2))
    kl = (np.exp(before) * (before - after)).sum(-1).mean(-1)
    same = (before.argmax(-1) == after.argmax(-1)).mean(-1)
    found = run[0][1].quality
    perplexity, loss_error = np.exp(losses.mean()), losses.std(ddof=1) / np.sqrt(len(losses))
    assert found.perplexity.mean == pytest.approx(perplexity, rel=1e-5)
    assert found.perplexity.error == pytest.approx(perplexity * loss_error, rel=1e-3)
    assert found.kl.mean == pytest.approx(kl.mean(), rel=1e-3) and kl.mean() > 0
    assert found.same_top1.mean == pytest.approx(same.mean())


def test_sizes_are_those_of_the_files(tiny, run):
    parameters = sum(tiny.aval(name).size for name in tiny.names("weight"))
    for result in run[0]:
        step = to_step(preset(result.name)(tiny))
        arrays = {name: np.asarray(array) for name, array in step.arrays.items()}
        assert result.disk_bytes == len(safetensors.numpy.save(arrays))
        assert result.read_bytes == sum(step.arrays[name].nbytes for name in step.names("weight"))
        assert result.bits_per_weight == 8 * result.read_bytes / parameters


def test_speeds_are_measured(run):
    results, conditions, _ = run
    assert all(r.speed.prefill > 0 and r.speed.decode > 0 and r.speed.read_limit > 0 for r in results)
    assert all(r.read_rate == r.read_bytes * r.speed.decode for r in results)
    assert (conditions.prompt_tokens, conditions.new_tokens) == (8, 4)


def test_every_stage_is_told_in_plain_text(run):
    printed = run[2]
    assert "\x1b" not in printed
    passes = ("canonicalize", "fuse_attention", "quantize", "kv_cache")
    assert all(f"\n  {stage}" in printed for stage in (*passes, "cache:", "compile:", "save:", "held out:"))
    assert printed.count("\ndef f") == len(PIPELINES)
    assert printed.count("128 bytes a token") == len(PIPELINES)  # float32 keys and values of one head of 16


def test_tables_fit_a_terminal_and_say_what_they_are_of(run):
    results, conditions, _ = run
    console = Console(file=io.StringIO(), width=80)
    console.print(quality_table(results, conditions), speed_table(results, conditions))
    lines = console.file.getvalue().splitlines()
    assert "48 held-out tokens in 3 windows" in "\n".join(lines)
    starts = [line.split()[0] for line in lines if line.strip().startswith(PIPELINES)]
    assert starts == [*PIPELINES, *PIPELINES]
    assert "…" not in console.file.getvalue()


def test_json_holds_every_figure(run, tmp_path):
    results, conditions, _ = run
    write_json(tmp_path / "figures.json", results, conditions)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [r["quality"]["kl"]["mean"] for r in figures["results"]] == [r.quality.kl.mean for r in results]
    assert figures["conditions"]["windows"] == 3


def test_standard_error_over_windows():
    found = over_windows([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.error == pytest.approx(np.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3))


def test_quality_tells_its_progress(tiny):
    fractions = []
    quality(tiny, tiny, WINDOWS, lambda text, fraction: fractions.append(fraction))
    assert fractions == [0, 1 / 3, 2 / 3]


def test_held_out_windows_are_spread_over_the_text():
    few, more = held_out_windows(2 * DEMO_LENGTH), held_out_windows(4 * DEMO_LENGTH + 1)
    assert few.shape == (2, DEMO_LENGTH) and more.shape == (4, DEMO_LENGTH)
    np.testing.assert_array_equal(few[[0, 1]], more[[0, 3]])
    with pytest.raises(OptionError, match="at most"):
        held_out_windows(10**9)
