"""Pipelines: order, text, and what is checked after each pass."""

import dataclasses
from typing import ClassVar, final

import jax.numpy as jnp
import numpy as np
import pytest

import xlathe as xl
from tests.graphs import graph_of, traced
from xlathe import jaxpr as ir
from xlathe.graph import Graph, Input, Record
from xlathe.passes import PASSES, Canonicalize, FuseAttention, KVCache
from xlathe.pipeline import APPROXIMATE, EXACT, REASSOCIATED, Context, Keeps, Pass, has_op, is_step

E = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)


def graph() -> Graph:
    return graph_of(lambda p, ids: p["e"][ids] @ p["e"].T, e=E)


@final
@dataclasses.dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the logits."""

    keeps: ClassVar[Keeps] = REASSOCIATED
    by: float = 1.0
    note: str = "scaled"

    def apply(self, graph, context):
        def scaled(*operands):
            return ir.evaluate(graph.jaxpr, operands)[0] * self.by

        jaxpr = ir.trace(scaled, *(v.aval for v in graph.jaxpr.invars))
        return graph.replace(jaxpr=jaxpr), Record("", hits={"logits": 1}, misses=("a miss",), notes=(self.note,))


@final
@dataclasses.dataclass(frozen=True)
class ScaleLossy(Pass):
    keeps: ClassVar[Keeps] = APPROXIMATE

    def apply(self, graph, context):
        return Scale(2.0).apply(graph, context)


@final
@dataclasses.dataclass(frozen=True)
class ScaleExactly(Pass):
    keeps: ClassVar[Keeps] = EXACT
    by: float = 1.0

    def apply(self, graph, context):
        return Scale(self.by).apply(graph, context)


@final
@dataclasses.dataclass(frozen=True)
class Broken(Pass):
    """Breaks the graph, or fails, in the way asked for."""

    how: str = "rename"

    def apply(self, graph, context):
        if self.how == "rename":
            return graph.replace(inputs=(Input("nowhere", "weight"), *graph.inputs[1:])), Record("")
        if self.how == "bug":
            raise ZeroDivisionError("a bug")
        raise xl.DeriveError("a token mean")


@final
@dataclasses.dataclass(frozen=True)
class Promises(Pass):
    needs = (has_op("attention"),)
    gives = (is_step,)

    def apply(self, graph, context):
        return graph, Record("")


def test_runs_in_order():
    result = xl.Pipeline([Canonicalize(), Scale(2.0), Scale(0.25)])(graph())
    assert [record.name for record in result.history] == ["canonicalize", "scale{by=2.0}", "scale{by=0.25}"]
    assert np.allclose(result([[1, 2]]), 0.5 * graph()([[1, 2]]))
    assert result.history[1].equations == (result.history[0].equations[1], result.history[0].equations[1] + 1)


def test_no_pass_changes_nothing():
    before = graph()
    assert xl.Pipeline([])(before) is before


def test_pipelines_of_pipelines_are_flat():
    inner = xl.Pipeline([Canonicalize(), Scale()], expect={"logits": 1, "merged": 0})
    outer = xl.Pipeline([inner, Scale(2.0)], expect={"logits": 2})
    assert outer.passes == (Canonicalize(), Scale(), Scale(2.0))
    assert outer.expect == {"logits": 2, "merged": 0}


def test_text_round_trip():
    text = "canonicalize,fuse_attention,quantize{scheme=int8,granularity=channel},kv_cache,specialize{rows=4,tokens=8}"
    pipeline = xl.Pipeline.parse(text, PASSES)
    assert xl.Pipeline.parse(str(pipeline), PASSES) == pipeline
    assert str(pipeline).startswith("canonicalize,fuse_attention,quantize") and len(pipeline.passes) == 5


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_a_text(name):
    """Expected: the default options print as the bare name, which reads back; what has no default is told."""
    text = {"budget": "budget{bits=4.5}"}.get(name, name)
    (pass_,) = xl.Pipeline.parse(text, PASSES).passes
    assert str(pass_) == text and type(pass_) is PASSES[name]


def test_unknown_pass():
    with pytest.raises(xl.OptionError, match="unknown pass 'fuse_atention'; did you mean 'fuse_attention'"):
        xl.Pipeline.parse("canonicalize,fuse_atention", PASSES)


def test_a_real_pipeline_keeps_what_it_says():
    result = xl.Pipeline([Canonicalize(), FuseAttention(), KVCache()], verify=True, expect={"attention": 2})(
        traced("grouped_einsum_gqa")
    )
    assert result.is_step


def test_verify_finds_a_pass_that_does_not_keep_its_word():
    ids = np.array([[1, 2, 3]], np.int32)
    xl.Pipeline([Scale(1.0 + 1e-7), ScaleLossy(), ScaleExactly(1.0)], verify=ids)(graph())
    with pytest.raises(xl.PassError, match=r"pass 2 of 2, scale\{by=1.5\}: promised a relative .* found 5.0e-01"):
        xl.Pipeline([Canonicalize(), Scale(1.5)], verify=ids)(graph())
    with pytest.raises(xl.PassError, match="equal bits"):
        xl.Pipeline([ScaleExactly(1.0 + 1e-6)], verify=True)(graph())


def test_structure_is_checked_without_verify():
    with pytest.raises(xl.PassError, match="pass 1 of 1, broken: there is no array for the input 'nowhere'"):
        xl.Pipeline([Broken()])(graph())


@pytest.mark.parametrize("given", [None, 3, [3], [Canonicalize], "canonicalize"])
def test_what_is_no_list_of_passes(given):
    with pytest.raises(xl.OptionError, match="a pipeline is a list of passes"):
        xl.Pipeline(given)


@pytest.mark.parametrize("taker", [xl.Pipeline([]), Canonicalize(), xl.compile])
def test_what_is_no_graph(taker):
    with pytest.raises(xl.OptionError, match=r"takes a graph .* got NoneType"):
        taker(None)


def test_a_pipeline_of_a_generator():
    assert xl.Pipeline(each for each in [Canonicalize()]).passes == (Canonicalize(),)


def test_needs_and_gives():
    with pytest.raises(xl.PassError, match=r"Promises needs: an operation xlathe.attention"):
        xl.Pipeline([Promises()])(graph())
    with pytest.raises(xl.PassError, match="Promises promises: an incremental step"):
        xl.Pipeline([Canonicalize(), FuseAttention(), Promises()])(traced("heads_first"))


def test_expectations():
    two = [Scale(), Scale(by=2.0)]
    xl.Pipeline(two, expect={"logits": 2})(graph())
    with pytest.raises(xl.PassError, match=r"expected 3 hits of 'logits', found 2; nearly:\n  a miss"):
        xl.Pipeline(two, expect={"logits": 3})(graph())
    with pytest.raises(xl.PassError, match="no pass counts it; did you mean 'logits'"):
        xl.Pipeline(two, expect={"logit": 1})(graph())


def test_expectations_count_this_run_only():
    once = xl.Pipeline([Scale()])(graph())
    with pytest.raises(xl.PassError, match="found 1"):
        xl.Pipeline([Scale()], expect={"logits": 2})(once)


def test_failures_keep_their_kind_and_name_the_pass():
    with pytest.raises(xl.DeriveError, match=r"pass 2 of 2, broken\{how=derive\}: a token mean"):
        xl.Pipeline([Canonicalize(), Broken(how="derive")])(graph())
    with pytest.raises(xl.PassError, match=r"broken\{how=bug\}: ZeroDivisionError: a bug") as caught:
        xl.Pipeline([Broken(how="bug")])(graph())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_dump(tmp_path):
    xl.Pipeline([Canonicalize(), Scale(2.0)])(graph(), dump=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00_input.py", "01_canonicalize.py", "02_scale.py"]
    assert "mul(" in (tmp_path / "02_scale.py").read_text()


def test_reproducer(tmp_path):
    """Expected: the graph before the failing pass, and its text, read back and fail again."""
    before = Scale(2.0)(graph())
    with pytest.raises(xl.DeriveError, match=r"reproducer in .*reproducer"):
        xl.Pipeline([Scale(2.0), Broken(how="derive")])(graph(), dump=tmp_path)
    folder = tmp_path / "reproducer"
    again = xl.load_graph(folder)
    assert again.structural_hash == before.structural_hash and again.history[0].name == "scale{by=2.0}"
    pipeline = xl.Pipeline.parse((folder / "pipeline.txt").read_text(), {"broken": Broken})
    with pytest.raises(xl.DeriveError, match="a token mean"):
        pipeline(again)


def test_print_after_change(capsys):
    xl.Pipeline([Canonicalize(), Scale(2.0)])(Canonicalize()(graph()), print_after_change=True)
    printed = capsys.readouterr().out
    assert "--- 2: scale" in printed and "--- 1:" not in printed
    assert any(line.startswith("+") and "mul(" in line for line in printed.splitlines())


def test_context_reaches_the_pass():
    @final
    @dataclasses.dataclass(frozen=True)
    class Look(Pass):
        def apply(self, graph, context: Context):
            context.progress("looking", 0.5)
            return graph, Record("", notes=(f"{len(context.calibration)} {context.seed}",))

    heard = []
    result = xl.Pipeline([Look()])(
        graph(), calibration=[1, 2], seed=7, progress=lambda what, share: heard.append((what, share))
    )
    assert result.history[-1].notes == ("2 7",)
    assert heard == [("look", 0.0), ("looking", 0.5), ("done", 1.0)]


def test_report():
    """Expected: size, bits a weight, and a line a pass with its hits, near misses and notes."""
    result = xl.Pipeline([Canonicalize(), Scale(2.0, note="by two")])(graph())
    text = result.report()
    assert "44 parameters, 0.00 MB of weights, 32.00 bits a weight" in text
    (line,) = [line for line in text.splitlines() if "scale{by=2.0" in line and "->" in line]
    assert "1 logits" in line
    assert 'note="by two"}: by two' in text and "nearly: a miss" in text and "\x1b" not in text


def test_report_counts_what_recipes_replaced():
    """Expected: bits a weight are those of codes and scales over the weights as they were trained."""
    before = Canonicalize()(traced("heads_first"))
    after = xl.Pipeline.parse("quantize", PASSES)(before)
    parameters = sum(np.size(before.weights[name]) for name in before.names("weight"))
    stored = sum(np.asarray(after.weights[name]).nbytes for name in after.names("weight"))
    assert f"{parameters:,} parameters" in before.report() and f"{parameters:,} parameters" in after.report()
    assert f"{8 * stored / parameters:.2f} bits a weight" in after.report()
    assert jnp.float32 == before.aval("embed").dtype


@pytest.mark.parametrize("calibration", [3, None, "text", {"tokens": [[1]]}, iter([])])
def test_calibration_of_a_wrong_type_is_refused_even_where_nobody_reads_it(calibration):
    with pytest.raises(xl.errors.OptionError, match=rf"list of batches, .* got {type(calibration).__name__}"):
        xl.Pipeline([])(graph(), calibration=calibration)
