"""Passes as text."""

import dataclasses
from typing import Literal

import pytest

from xlathe.errors import OptionError
from xlathe.pass_text import parse_passes, pass_name, print_pass


@dataclasses.dataclass(frozen=True)
class PruneHeads:
    share: float = 0.25
    layers: tuple[int, ...] = ()
    score: Literal["l2", "activation"] = "l2"
    name: str | None = None
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class KVCacheV2:
    pages: int


TABLE = {pass_name(cls): cls for cls in (PruneHeads, KVCacheV2)}


@pytest.mark.parametrize(
    ("cls", "name"),
    [("KVCache", "kv_cache"), ("FuseAttention", "fuse_attention"), ("Quantize", "quantize"), ("A2B", "a2_b")],
)
def test_names(cls, name):
    assert pass_name(type(cls, (), {})) == name


@pytest.mark.parametrize(
    ("pass_", "text"),
    [
        (PruneHeads(), "prune_heads"),
        (PruneHeads(share=0.5), "prune_heads{share=0.5}"),
        (PruneHeads(layers=(1, 2)), "prune_heads{layers=(1,2,)}"),
        (PruneHeads(score="activation", exact=True), "prune_heads{score=activation,exact=true}"),
        (PruneHeads(name="none"), 'prune_heads{name="none"}'),
        (PruneHeads(name=""), 'prune_heads{name=""}'),
        (PruneHeads(name='a "b", {c}=\\'), 'prune_heads{name="a \\"b\\", {c}=\\\\"}'),
        (PruneHeads(name="layers/0/*.up"), "prune_heads{name=layers/0/*.up}"),
        (PruneHeads(share=1e-7), "prune_heads{share=1e-07}"),
        (PruneHeads(share=float("inf")), "prune_heads{share=inf}"),
        (KVCacheV2(pages=-3), "kv_cache_v2{pages=-3}"),
    ],
)
def test_round_trip(pass_, text):
    assert print_pass(pass_) == text
    assert parse_passes(text, TABLE) == [pass_]


def test_several_passes_and_spaces():
    text = " prune_heads { share = 0.5 , } , kv_cache_v2{pages=4}\n"
    assert parse_passes(text, TABLE) == [PruneHeads(share=0.5), KVCacheV2(pages=4)]


def test_whole_numbers_are_floats_where_floats_are_wanted():
    (pass_,) = parse_passes("prune_heads{share=1}", TABLE)
    assert type(pass_.share) is float and pass_.share == 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prune_head", "unknown pass 'prune_head'; did you mean 'prune_heads'"),
        ("", "expected more, found the end"),
        ("prune_heads,", "found the end"),
        ("prune_heads prune_heads", "expected ','"),
        ("prune_heads{shar=1}", "no option 'shar'; did you mean 'share'"),
        ("prune_heads{share=a}", "share must be float, got a"),
        ("prune_heads{share=true}", "share must be float, got true"),
        ("prune_heads{layers=1}", r"layers must be tuple\[int, ...\], got 1"),
        ("prune_heads{layers=(1.5,)}", "layers must be"),
        ("prune_heads{score=l3}", "score must be Literal"),
        ("prune_heads{exact=1}", "exact must be bool, got 1"),
        ("prune_heads{exact=none}", "exact must be bool, got none"),
        ("prune_heads{share=1,share=2}", "given twice"),
        ("prune_heads{share=1", "found the end"),
        ("prune_heads{share}", "expected '='"),
        ("prune_heads{share=1.2.3}", "1.2.3 is no value"),
        ('prune_heads{name="a}', "unexpected"),
        ("prune_heads{name=$}", "unexpected '\\$'"),
        ("kv_cache_v2", "pages"),
        ("kv_cache_v2{pages=4.0}", "pages must be int"),
    ],
)
def test_refused(text, reason):
    with pytest.raises(OptionError, match=reason):
        parse_passes(text, TABLE)
