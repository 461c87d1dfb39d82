"""The demo's figures agree with each other and with what is computed apart from it."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from rich.console import Console

import xlathe as xl
from xlathe.aot import to_step
from xlathe.card import Card
from xlathe.errors import OptionError
from xlathe.graph import Record
from xlathe.models import demo
from xlathe.models.demo import corpus
from xlathe.models.llama import Llama, LlamaConfig, describe
from xlathe.tools.demo import DRAFTINGS, PIPELINES
from xlathe.tools.measure import qualities
from xlathe.tools.mixes import find_mix
from xlathe.tools.page import page
from xlathe.tools.results import sheets
from xlathe.tools.served import Served
from xlathe.tools.source import DEMO_LENGTH, preset
from xlathe.tools.stages import Drafting, Task, run_stages
from xlathe.tools.text import TrainingRows, held_out_windows, training_rows

pytestmark = pytest.mark.timeout(900)  # nine pipelines are built before the first test

WINDOWS = np.random.default_rng(0).integers(1, 4096, (3, 16), dtype=np.int32)
CALIBRATION = TrainingRows(("calibrated_on.py",), np.random.default_rng(1).integers(1, 4096, (2, 16), dtype=np.int32))
WIDE = LlamaConfig(vocab=4096, width=32, layers=1, query_heads=8, key_value_heads=4, head_dim=16, hidden=320)
PROMPT = "<script>alert('def')</script> & f"


@pytest.fixture(scope="module")
def model() -> xl.Graph:
    """Wide enough that there is something to prune; logits apart enough that greedy text is stable."""
    graph = xl.trace(Llama(WIDE, rngs=nnx.Rngs(0)), max_len=32, tokenizer=demo.tokenizer())
    return graph.replace(card=Card({**describe(WIDE, 32), "eos_token_id": 0}))


@pytest.fixture(scope="module")
def run(model, tiny):
    """The report on all pipelines, and what was printed on the way."""
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False)
    task = Task(model, tiny, WINDOWS, CALIBRATION, prompt=PROMPT, max_tokens=4)
    pipelines = [(name, find_mix(name, model)) for name in PIPELINES]
    report = run_stages(task, pipelines, [Drafting("float32", "n-gram", 2), Drafting("int8", "model", 1)], console)
    return report, console.file.getvalue()


@pytest.fixture(scope="module")
def results(run):
    return {result.name: result for result in run[0].results}


def shaped(model, name):
    return find_mix(name, model)(model, calibration=list(CALIBRATION.tokens[:, None]))


def log_probabilities(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_float32_differs_in_nothing_from_itself(results):
    found = results["float32"]
    assert (found.quality.kl.mean, found.quality.kl.error) == (0, 0)
    assert (found.quality.same_top1.mean, found.quality.same_top1.error) == (1, 0)
    assert found.bits_per_weight == 32


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "float32"])
def test_quality_is_that_of_the_graphs(model, results, name):
    """The graphs run on reference bodies, in one piece; the figures come from kernels and a cache."""
    before, after = (log_probabilities(shaped(model, each)(WINDOWS)) for each in ("float32", name))

    losses = -np.take_along_axis(after[:, :-1], WINDOWS[:, 1:, None], -1).mean((1, 2))
    kl = (np.exp(before) * (before - after)).sum(-1)[:, :-1].mean(-1)  # where a token follows
    same = (before.argmax(-1) == after.argmax(-1))[:, :-1].mean(-1)
    found = results[name].quality
    perplexity, loss_error = np.exp(losses.mean()), losses.std(ddof=1) / np.sqrt(len(losses))
    assert found.perplexity.mean == pytest.approx(perplexity, rel=1e-5)
    assert found.perplexity.error == pytest.approx(perplexity * loss_error, rel=1e-3)
    assert found.kl.mean == pytest.approx(kl.mean(), rel=1e-3) and kl.mean() > 0
    assert found.same_top1.mean == pytest.approx(same.mean())


def test_a_cache_in_8_bits_costs_what_its_weights_do_and_more(results):
    assert results["int8_cache"].quality.kl.mean > results["int8"].quality.kl.mean
    assert results["int8_cache"].cache_bytes < results["int8"].cache_bytes / 3
    assert results["int8"].cache_bytes == 4 * 2 * 4 * 16  # float32 keys and values of 4 heads of 16


def test_served_logits_are_those_of_the_graph_over_more_than_one_chunk(tiny, monkeypatch):
    monkeypatch.setattr("xlathe.tools.served.CHUNK", 5)
    found, expected = Served(to_step(tiny))(WINDOWS), np.asarray(tiny(WINDOWS))
    assert found.shape == expected.shape == (3, 16, 4096)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_sizes_are_those_of_the_files(model, results):
    parameters = sum(model.aval(name).size for name in model.names("weight"))
    for name, result in results.items():
        step = to_step(shaped(model, name))
        arrays = {name: np.asarray(array) for name, array in step.arrays.items()}
        # the reference orders arrays otherwise: their places have other numbers of digits
        assert abs(result.disk_bytes - len(safetensors.numpy.save(arrays))) <= 8 * len(arrays)
        assert result.read_bytes == sum(step.arrays[name].nbytes for name in step.names("weight"))
        assert result.bits_per_weight == 8 * result.read_bytes / parameters


def test_what_pruning_removed_is_told_in_words(results):
    assert {name for name, result in results.items() if result.removed} == {"pruned"}
    assert results["pruned"].removed == "1 of 4 key-value heads, 32 of 320 neurons"


def test_speeds_are_measured(run):
    report = run[0]
    assert all(r.speed.prefill > 0 and r.speed.decode > 0 and r.limit > 0 for r in report.results)
    assert all(r.read_rate == r.read_bytes * r.speed.decode for r in report.results)
    assert (report.conditions.prompt_tokens, report.conditions.new_tokens) == (8, 4)


def test_drafts_change_no_text(run):
    first, second = run[0].drafted
    assert (first.name, second.name) == ("float32 n-gram x 2", "int8 model x 1")
    assert [len(first.acceptance), len(second.acceptance)] == [2, 1]
    for found in (first, second):
        assert (found.same_text, found.prompts) == (3, 3)
        assert found.plain > 0 and found.decode > 0 and found.ratio > 0
        assert found.tokens_per_step >= 1 and all(0 <= share <= 1 for share in found.acceptance)


def test_a_row_may_begin_with_another_model(tiny):
    console = Console(file=io.StringIO(), width=80)
    smaller = tiny.replace(history=(Record("distill", notes=("removed half the parameters, distilled",)),))
    larger = xl.trace(Llama(WIDE, rngs=nnx.Rngs(0)), max_len=32, tokenizer=demo.tokenizer())
    task = Task(larger, tiny, WINDOWS, CALIBRATION, prompt="def", max_tokens=2, others={"half": smaller})
    first, half = run_stages(task, [(name, preset("float32")) for name in ("float32", "half")], [], console).results
    assert half.removed == "half the parameters, distilled" and first.removed == ""
    assert half.disk_bytes < first.disk_bytes and half.bits_per_weight < 32 == first.bits_per_weight


def test_what_is_drafted_for_is_built():
    assert {Drafting(*each).pipeline for each in DRAFTINGS} <= set(PIPELINES)


def test_every_stage_is_told_in_plain_text(run):
    printed = run[1]
    assert "\x1b" not in printed
    passes = ("canonicalize", "fuse_attention", "quantize", "prune_structured", "cache_layout", "kv_cache")
    assert all(f"\n  {stage}" in printed for stage in (*passes, "cache:", "compile:", "save:"))
    assert printed.count(f"\n{PROMPT}") == len(PIPELINES)


def test_tables_fit_a_terminal_and_say_what_they_are_of(run):
    console = Console(file=io.StringIO(), width=80)
    console.print(*(sheet.as_table() for sheet in sheets(run[0])))
    lines = console.file.getvalue().splitlines()
    assert "48 held-out tokens in 3 windows" in "\n".join(lines)
    starts = [line.split()[0] for line in lines if line.strip().startswith(PIPELINES)]
    assert starts == [*PIPELINES, *PIPELINES, *PIPELINES, "float32", "int8"]
    assert "…" not in console.file.getvalue()


def test_json_holds_every_figure(run, tmp_path):
    report = run[0]
    report.write_json(tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [r["quality"]["kl"]["mean"] for r in figures["results"]] == [r.quality.kl.mean for r in report.results]
    assert [tuple(d["acceptance"]) for d in figures["drafted"]] == [d.acceptance for d in report.drafted]
    assert figures["conditions"]["windows"] == 3


class Reader(HTMLParser):
    """Checks that elements nest; collects the text in tables, all text, and everything that is referred to."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.cells, self.text, self.ids = [], [], [], [], []
        self.labels, self.images = [], 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        assert not given.keys() & {"src", "href", "onload", "onclick"}
        self.ids += [given["id"]] if "id" in given else []
        self.labels += given.get("aria-labelledby", "").split()
        self.images += given.get("role") == "img"
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th", "caption"} & set(self.open):
            self.cells.append(data)


def test_the_page_holds_every_figure_and_needs_nothing_else(run):
    report, text = run[0], page(run[0])
    read = Reader(text)
    for sheet in sheets(report):
        cells = {cell for row in sheet.rows for cell in row if cell}
        assert {sheet.caption, *sheet.headings, *cells} <= set(read.cells)
    for result in report.results:
        assert result.passes in read.text and result.name in read.text
    assert "calibrated_on.py" in "".join(read.text)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert read.images == read.seen.count("svg") == 3
    assert len(set(read.ids)) == len(read.ids) and set(read.labels) <= set(read.ids)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">')


def test_the_page_escapes_what_others_wrote(run):
    read = Reader(page(run[0]))
    assert "script" not in read.seen
    assert read.text.count(PROMPT) == len(PIPELINES)


def test_calibration_is_not_on_what_is_held_out():
    rows = training_rows()
    assert rows.tokens.shape == (len(rows.names), DEMO_LENGTH) and len(rows.names) >= 4
    starts = {tuple(ids[: DEMO_LENGTH - 1]) for ids in held_out_ids()}
    assert not starts & {tuple(row[1:]) for row in rows.tokens.tolist()}
    assert set(rows.tokens[:, 0].tolist()) == {corpus.END_OF_TEXT}


def held_out_ids():
    return [encoding.ids for encoding in demo.tokenizer().encode_batch_fast(corpus.held_out_files())]


def test_quality_tells_its_progress(tiny):
    fractions = []
    qualities(tiny, [tiny, tiny], WINDOWS, lambda text, fraction: fractions.append(fraction))
    assert fractions == [0, 1 / 2]


def test_held_out_windows_are_spread_over_the_text():
    few, more = held_out_windows(2 * DEMO_LENGTH), held_out_windows(4 * DEMO_LENGTH + 1)
    assert few.shape == (2, DEMO_LENGTH) and more.shape == (4, DEMO_LENGTH)
    np.testing.assert_array_equal(few[[0, 1]], more[[0, 3]])
    with pytest.raises(OptionError, match="at most"):
        held_out_windows(10**9)
