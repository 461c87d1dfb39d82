"""Pretrained families against transformers, for what `config.json` can say of each, and what is derived from them."""

import math
from pathlib import Path

import numpy as np
import pytest

import xlathe
from tests.models.parity.cases import ENCODERS, FAMILIES, WINDOW, Case, Family, every_case
from tests.models.parity.checkpoints import (
    FIXTURES,
    Expected,
    arrays_of,
    expected_of,
    expected_of_fixture,
    fixtures,
    write_case,
)
from tests.models.parity.table import README, Check, checked, in_readme, table
from tests.passes.decoding import CHUNK, decode, difference
from xlathe.graph import Graph
from xlathe.models.pretrained import from_pretrained
from xlathe.passes.cache_layout import CacheLayout
from xlathe.passes.canonicalize import Canonicalize
from xlathe.passes.fuse_attention import FuseAttention
from xlathe.passes.kv_cache import KVCache
from xlathe.program import Program
from xlathe.step import state_avals

RTOL = 2e-4  # of the largest logit: float32 sums in another order, through the layers
SCHEDULE = [{0: 5, 1: 3}, {1: 8}, {0: 1, 1: 6}, {0: 7}, {0: 3, 1: 1}, {0: 4, 1: 2}]  # 20 tokens of each text


def parameters(check: Check) -> list[object]:
    return [
        pytest.param(
            family,
            case,
            id=f"{family.model_type}-{case.name}",
            marks=[pytest.mark.breadth] if case is not family.cases[0] else [],
        )
        for family, case in every_case()
        if checked(check, family, case)
    ]


def cases(check: Check) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("family", "case"), parameters(check))


@pytest.fixture
def folder(tmp_path: Path, family: Family, case: Case) -> Path:
    write_case(family, case, tmp_path)
    return tmp_path


def fused(folder: Path, max_len: int | None = None) -> Graph:
    return FuseAttention()(Canonicalize()(from_pretrained(folder, max_len=max_len)))


def layers(graph: Graph) -> int:
    assert graph.card is not None
    return int(graph.card.config.get("num_hidden_layers", graph.card.config.get("n_layer")))


def check_forward(graph: Graph, expected: Expected) -> None:
    assert difference(graph(expected.prompts), expected.logits) < RTOL


def check_recognized(graph: Graph) -> None:
    (record,) = (r for r in graph.history if r.name == "fuse_attention")
    assert record.hits == {"attention": layers(graph)}


def check_chunks(step: Graph, expected: Expected) -> None:
    found = decode(step, list(expected.prompts), SCHEDULE, rows=[2, 0], slots=24)
    assert difference(np.stack(found), expected.logits) < RTOL


def compiled(graph: Graph, expected: Expected) -> Program:
    slots = expected.prompts.shape[1] + len(expected.greedy)
    return xlathe.compile(graph, max_batch=1, max_len=slots, unit=8, chunks=(8,), stop_tokens=())


def check_greedy(program: Program, expected: Expected) -> None:
    (row,) = program.generate(expected.prompts[:1], max_tokens=len(expected.greedy))
    assert row.tokens == tuple(expected.greedy)


@cases("chunks")
def test_what_config_json_says(family: Family, case: Case, folder: Path) -> None:
    """All of one configuration in one test: tracing and deriving it takes most of the time."""
    graph, expected = fused(folder, case.max_len), expected_of(family, case)
    check_forward(graph, expected)
    check_recognized(graph)
    check_chunks(KVCache()(graph), expected)


@pytest.mark.parametrize(("family", "case"), [(family, case) for family in ENCODERS for case in family.cases])
def test_encoders(family: Family, case: Case, folder: Path) -> None:
    """Expected: padded tokens are seen by none, and the rest is as transformers has it, the padded places included."""
    graph, arrays = fused(folder), arrays_of(family, case)
    arguments = {name: arrays[name] for name in graph.names("arg") if name != "tokens"}
    assert difference(graph(arrays["input_ids"], **arguments), arrays["logits"]) < RTOL
    check_recognized(graph)


@cases("ring")
def test_windows_are_rings_whose_size_is_not_the_text_s(family: Family, case: Case, folder: Path) -> None:
    graph = CacheLayout("ring", slack=CHUNK)(KVCache()(fused(folder, case.max_len)))
    short, long = ([aval.shape[1] for aval in state_avals(graph, 2, slots)] for slots in (32, 64))
    assert WINDOW + CHUNK in long
    assert all(size in (WINDOW + CHUNK, slots) for sizes, slots in ((short, 32), (long, 64)) for size in sizes)
    check_chunks(graph, expected_of(family, case))


@cases("bundle")
def test_a_program_and_its_bundle_give_the_same_tokens(
    family: Family, case: Case, folder: Path, tmp_path: Path
) -> None:
    """Expected: those of transformers, and of the bundle the same, without the graph."""
    program, expected = compiled(fused(folder, case.max_len), expected_of(family, case)), expected_of(family, case)
    check_greedy(program, expected)
    program.save(tmp_path / "bundle")
    check_greedy(xlathe.load(tmp_path / "bundle"), expected)


def test_the_compared_outputs_depend_on_masks_and_positions() -> None:
    """Logits of a text differ from token to token, and no row of them is flat."""
    for family, case in every_case():
        logits = arrays_of(family, case)["logits"]
        assert logits.std(axis=-1).min() > 0.1 * math.sqrt(case.embedding)
        assert np.abs(np.diff(logits, axis=1)).max(axis=-1).min() > 1e-2


def test_the_table_in_the_documentation_is_of_these_cases() -> None:
    """`python -m tests.models.parity.table --update` writes it."""
    assert in_readme(README.read_text()) == table(FAMILIES)


@pytest.mark.breadth
@pytest.mark.parametrize(
    "folder",
    [pytest.param(path, id=path.name) for path in fixtures()]
    or [pytest.param(None, marks=pytest.mark.skip(f"no checkpoints: {FIXTURES} names no folder of them"))],
)
def test_checkpoints_that_transformers_saved(folder: Path) -> None:
    graph, expected = fused(folder), expected_of_fixture(folder)
    check_forward(graph, expected)
    check_recognized(graph)
    check_greedy(compiled(graph, expected), expected)
