"""A compiled program generates what its graph says, for one row and for many."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.passes.decoding import fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, RequestError, XlatheError
from xlathe.graph import Graph
from xlathe.program import Program, compile

(LLAMA,) = (v for v in DECODERS if v.name == "llama")
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5], [7, 8, 9]]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return fused(LLAMA)


@pytest.fixture(scope="module")
def program(graph: Graph) -> Program:
    return compile(graph, max_batch=3, max_len=48, unit=5, chunks=(4, 8))


@pytest.fixture(scope="module")
def talking(program: Program) -> Program:
    """The same program with a tokenizer whose token i is the word `wi`."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(LLAMA.vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return dataclasses.replace(program, tokenizer=words)


def greedy(graph: Graph, prompt: list[int], count: int) -> tuple[int, ...]:
    """The oracle: a full forward for every token, of one length that it is compiled for."""
    ids = np.zeros((1, 48), np.int32)
    ids[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + count):
        ids[0, i] = np.argmax(graph(ids)[0, i - 1])
    return tuple(ids[0, len(prompt) : len(prompt) + count].tolist())


def test_greedy_tokens_are_those_of_full_forwards(graph: Graph, program: Program) -> None:
    found = program.generate(PROMPTS, max_tokens=7)
    assert [c.tokens for c in found] == [greedy(graph, prompt, 7) for prompt in PROMPTS]
    assert [c.finish_reason for c in found] == ["length"] * 3


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01}])
def test_a_row_alone_equals_the_row_in_a_batch(program: Program, options: dict) -> None:
    together = program.generate(PROMPTS, max_tokens=9, seed=4, **options)
    for i, prompt in enumerate(PROMPTS[:1]):  # row i draws with fold_in(seed, i): only row 0 can be asked alone
        (alone,) = program.generate([prompt], max_tokens=9, seed=4, **options)
        assert alone.tokens == together[i].tokens
    if not options:
        assert [program.generate([p], max_tokens=9)[0].tokens for p in PROMPTS] == [c.tokens for c in together]


def test_a_seed_repeats_and_another_differs(program: Program) -> None:
    one, again, other = (
        [c.tokens for c in program.generate(PROMPTS, max_tokens=12, temperature=1.5, seed=seed)] for seed in (1, 1, 2)
    )
    assert one == again != other


def test_stop_tokens_end_a_row_and_are_not_part_of_it(graph: Graph, program: Program) -> None:
    expected = greedy(graph, PROMPTS[0], 12)
    stop = expected[6]
    (found,) = program.generate([PROMPTS[0]], max_tokens=12, stop=stop)
    assert found.tokens == expected[: expected.index(stop)]
    assert found.finish_reason == "stop"


def test_stop_strings_end_a_row_across_units(graph: Graph, talking: Program) -> None:
    expected = greedy(graph, PROMPTS[0], 20)
    words = [f"w{i}" for i in expected]
    (found,) = talking.generate([PROMPTS[0]], max_tokens=20, stop=f"{words[5]} {words[6]}")
    text = " ".join(words)
    assert found.text == text[: text.index(f"{words[5]} {words[6]}")]
    assert found.finish_reason == "stop"


def test_streamed_pieces_make_up_the_completion(talking: Program) -> None:
    prompt = "w1 w2 w3"
    pieces = list(talking.stream(prompt, max_tokens=13))
    (whole,) = talking.generate(prompt, max_tokens=13)
    assert "".join(p.text for p in pieces) == whole.text
    assert tuple(t for p in pieces for t in p.tokens) == whole.tokens
    assert len(pieces) == 3  # units of 5, 5 and 3 tokens


def test_a_row_may_fill_the_cache_to_its_end(graph: Graph, program: Program) -> None:
    prompt = list(range(1, 41))
    (found,) = program.generate([prompt], max_tokens=8)
    assert found.tokens == greedy(graph, prompt, 8)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1] * 45], {"max_tokens": 4}, "prompt of 45 tokens and max_tokens=4 need 49 positions.*max_len=48"),
        ([[1, 61]], {}, r"prompt 0 has token id 61, outside the vocabulary 0\.\.60"),
        ([[1], [-1]], {}, "prompt 1 has token id -1"),
        ([[1]] * 4, {}, "4 rows, but the program was compiled with max_batch=3"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompt"),
        ([[1.5]], {}, "prompt 0 holds float64"),
        ("text", {}, "no tokenizer"),
        (5, {}, "prompt: expected text, or a list of rows; found 5"),
        (None, {}, "prompt: expected text, or a list of rows; found None"),
        (b"text", {}, "prompt: expected text, or a list of rows; found b'text'"),
        ({"a": 1}, {}, "prompt: expected text, or a list of rows"),
        ([1, 2, 3], {}, r"prompt is one flat list of token ids, expected a list of rows: \[\[1, 2, 3\]\]"),
        (np.array([1, 2, 3]), {}, "prompt is one flat list of token ids"),
        ([[[1], [2, 3]]], {}, "prompt 0 is no list of token ids: expected integers 0..60"),
        ([[[1, 2], [2, 3]]], {}, "prompt 0 is no list of token ids"),
        ([[1], None], {}, "prompt 1 is no list of token ids"),
        ([[True]], {}, "prompt 0 holds bool: expected integers"),
        ([[2**70]], {}, r"prompt 0 is no list of token ids: .* found \[11805"),
        (["a", [1]], {}, "prompt has 1 rows of text among 2, expected all or none"),
        ([[1]], {"max_tokens": None}, "max_tokens must be an integer of at least 1, got None"),
        ([[1]], {"max_tokens": "5"}, "max_tokens must be an integer of at least 1, got '5'"),
        ([[1]], {"max_tokens": 3.5}, "max_tokens must be an integer of at least 1, got 3.5"),
        ([[1]], {"max_tokens": True}, "max_tokens must be an integer of at least 1, got True"),
        (
            [[1]],
            {"stop": 2**40, "max_tokens": 2},
            "stop: expected strings that are not empty, or token ids 0..60; found 1099511627776",
        ),
        ([[1]], {"stop": -1, "max_tokens": 2}, "stop: expected .* found -1"),
        ([[1]], {"stop": [2.5], "max_tokens": 2}, r"stop: expected .* found \[2.5\]"),
        ([[1]], {"stop": 2.5, "max_tokens": 2}, "stop: expected .* found 2.5"),
        ([[1]], {"stop": [True], "max_tokens": 2}, "stop: expected .* found"),
        ([[1]], {"stop": [None], "max_tokens": 2}, "stop: expected .* found"),
        ([[1]], {"stop": [[3]], "max_tokens": 2}, "stop: expected .* found"),
        ([[1]], {"stop": "", "max_tokens": 2}, "stop: expected strings that are not empty"),
        ([[1]], {"stop": b"x", "max_tokens": 2}, "stop: expected strings"),
        ([[1]], {"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ([[1]], {"stop": "word", "max_tokens": 2}, "stop strings need a tokenizer"),
        ([[1]], {"stop": list(range(9)), "max_tokens": 2}, "9 stop tokens, but a program takes at most 8"),
    ],
)
def test_requests_that_do_not_fit(program: Program, prompt: object, options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        program.generate(prompt, **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=message):
        program.stream(prompt, **options)  # type: ignore[arg-type]  # before any piece is taken


def test_text_that_has_no_encoding(talking: Program) -> None:
    with pytest.raises(RequestError, match="prompt 1 is no valid Unicode text"):
        talking.generate(["w1", "w1 \ud800"])
    with pytest.raises(RequestError, match="prompt 0 is empty"):
        talking.generate("")


@pytest.mark.parametrize(
    "prompt",
    [np.array([[1, 2, 3]], np.uint8), (np.array([1, 2, 3], np.int64),), jnp.array([[1, 2, 3]]), iter([(1, 2, 3)])],
)
def test_token_ids_of_any_library(graph: Graph, program: Program, prompt: object) -> None:
    (found,) = program.generate(prompt, max_tokens=np.int64(4))  # type: ignore[arg-type]
    assert found.tokens == greedy(graph, [1, 2, 3], 4)


def test_stops_of_every_form(graph: Graph, talking: Program) -> None:
    expected = greedy(graph, PROMPTS[0], 12)
    third = expected[2]
    cut = expected[: expected.index(third)]
    for stop in (third, np.int64(third), [np.int32(third)], np.array([third, third]), {third}):
        assert talking.generate([PROMPTS[0]], max_tokens=12, stop=stop)[0].tokens == cut
    text = " ".join(f"w{i}" for i in expected)
    stop = f"w{third}"
    for stops in (stop, [stop], (stop, third)):
        assert (
            talking.generate([PROMPTS[0]], max_tokens=12, stop=stops)[0].text.strip()
            == text[: text.index(stop)].strip()
        )
    for stops in (None, (), []):
        assert talking.generate([PROMPTS[0]], max_tokens=12, stop=stops)[0].tokens == expected


@pytest.mark.timeout(60)
def test_a_program_that_returns_no_token_is_an_error(program: Program) -> None:
    def silent(arrays: object, rows: object, sampling: object, stops: object, limit: object, state: object) -> tuple:
        return np.full((1, 5), -1, np.int32), rows, state

    broken = dataclasses.replace(program, calls={**program.calls, "decode_r1": silent})
    with pytest.raises(XlatheError, match="row 0 got no token from its program, expected 1 to 5"):
        broken.generate([[1, 2]], max_tokens=3)


def test_options_that_are_out_of_range(program: Program, graph: Graph) -> None:
    with pytest.raises(OptionError, match="temperature"):
        program.generate([[1]], max_tokens=2, temperature=-1.0)
    for name in ("max_batch", "unit", "gamma"):
        with pytest.raises(OptionError, match=f"{name} must be at most 2147483647, got 1099511627776"):
            compile(graph, draft="ngram", **{name: 2**40})
    with pytest.raises(OptionError, match="max_batch must be an integer of at least 1, got 0"):
        compile(graph, max_batch=0)
    for options in ({"unit": 2.5}, {"max_len": 0}, {"max_len": "8"}, {"max_batch": None}, {"unit": True}):
        (name,) = options
        with pytest.raises(OptionError, match=f"compile: {name} must be an integer of at least 1, got "):
            compile(graph, **options)
    for chunks in (4, (), "16", [0], [2.5], None):
        with pytest.raises(OptionError, match=r"compile: (chunks must be a list|a chunk must be an integer)"):
            compile(graph, chunks=chunks)
    for ids in (3, [61], [-1], ["<end>"], list(range(9))):
        with pytest.raises(OptionError, match=r"stop_tokens must be at most 8 token ids 0\.\.60"):
            compile(graph, stop_tokens=ids)
    with pytest.raises(OptionError, match="no target 'tpu'"):
        compile(graph, target="tpu")
    with pytest.raises(RequestError, match="max_len=65, but the graph was traced with max_len=64"):
        compile(graph, max_len=65)
