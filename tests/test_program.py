"""A compiled program generates what its graph says, for one row and for many."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.passes.decoding import fused
from tests.variants import DECODERS
from xlathe.errors import OptionError, RequestError
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
    """The oracle: a full forward for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(np.argmax(np.asarray(graph(np.asarray([ids], np.int32)))[0, -1])))
    return tuple(ids[len(prompt) :])


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
        ([[1]], {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ([[1]], {"stop": "word", "max_tokens": 2}, "stop strings need a tokenizer"),
        ([[1]], {"stop": list(range(9)), "max_tokens": 2}, "9 stop tokens, but a program takes at most 8"),
    ],
)
def test_requests_that_do_not_fit(program: Program, prompt: object, options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        program.generate(prompt, **options)  # type: ignore[arg-type]


def test_options_that_are_out_of_range(program: Program, graph: Graph) -> None:
    with pytest.raises(OptionError, match="temperature"):
        program.generate([[1]], max_tokens=2, temperature=-1.0)
    with pytest.raises(OptionError, match="max_batch must be at least 1, got 0"):
        compile(graph, max_batch=0)
    with pytest.raises(OptionError, match="no target 'tpu'"):
        compile(graph, target="tpu")
    with pytest.raises(RequestError, match="max_len=65, but the graph was traced with max_len=64"):
        compile(graph, max_len=65)
