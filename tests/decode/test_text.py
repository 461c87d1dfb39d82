"""Streamed text equals decoded text, character by character and up to the first stop string."""

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from xlathe.decode.text import TextStream
from xlathe.errors import OptionError

CORPUS = [
    "def read(path):\n    return open(path).read()\n",
    "日本語のテキスト",
    "naïve café",
    "😀👍🏽 👨‍👩‍👧",
]


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE so small that most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback():
    """Pieces with a mark for the space before a word, and a token for every byte."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "日"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def pushes(ids, rng):
    """`ids` cut into runs of 0 to 4."""
    while ids:
        n = rng.randrange(5)
        yield ids[:n]
        ids = ids[n:]


def streamed(tokenizer, ids, stop=(), seed=0):
    stream = TextStream(tokenizer, stop)
    text = "".join(stream.push(run) for run in pushes(ids, random.Random(seed)))
    return text + stream.finish(), stream


def test_a_character_of_several_tokens_comes_whole(byte_level):
    characters = "😎漢א"
    ids = [byte_level.encode(character).ids for character in characters]
    assert min(map(len, ids)) > 1
    stream = TextStream(byte_level)
    for character, parts in zip(characters, ids, strict=True):
        assert [stream.push([part]) for part in parts] == [""] * (len(parts) - 1) + [character]
    assert stream.finish() == ""
    assert stream.taken == sum(map(len, ids))


@pytest.mark.parametrize("text", [*CORPUS, "ẅ̈ \u200b\ufffd end", "\ufffd\ufffd", ""])
def test_text_survives_tokenizing_and_streaming(byte_level, text):
    assert streamed(byte_level, byte_level.encode(text).ids)[0] == text


def test_random_ids_stream_to_what_they_decode_to(byte_level):
    """Among them are special tokens and bytes that are no text."""
    rng = random.Random(1)
    for seed in range(1000):
        ids = [rng.randrange(byte_level.get_vocab_size()) for _ in range(rng.randrange(40))]
        assert streamed(byte_level, ids, seed=seed)[0] == byte_level.decode(ids)


def test_bytes_without_an_end_are_released_at_the_end(byte_level):
    ids = byte_level.encode("ok😎").ids[:-1]
    stream = TextStream(byte_level)
    assert stream.push(ids) == "ok"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_spaces_that_a_decoder_drops_at_the_beginning_stay_in_the_middle(byte_fallback):
    rng = random.Random(2)
    words = [[byte_fallback.token_to_id(piece)] for piece in ["▁", "a", "b", "▁a", "▁b", "日"]]
    smiley = [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in "😎".encode()]
    for seed in range(500):
        ids = list(itertools.chain(*rng.choices([*words, smiley], k=rng.randrange(1, 12))))
        assert streamed(byte_fallback, ids, seed=seed)[0] == byte_fallback.decode(ids)


def test_byte_tokens_that_are_no_text_do_no_harm(byte_fallback):
    """Of such, a later one can turn all before it into U+FFFD, which no stream can take back."""
    a, b = (byte_fallback.token_to_id(piece) for piece in "ab")
    rng = random.Random(3)
    for _ in range(300):
        noise = [rng.randrange(1, 257) for _ in range(rng.randrange(1, 9))]
        stream = TextStream(byte_fallback)
        stream.push(noise)
        assert stream.push([a, b]).endswith("ab")


def reference_stop(text, stops):
    """Reads one character at a time until a stop string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize(
    ("text", "stop", "expected", "found"),
    [
        ("one\n\ntwo", "\n\n", "one", "\n\n"),
        ("one\ntwo", "\n\n", "one\ntwo", None),
        ("a\n\n\nb", ["\n\n\n", "\n\n"], "a", "\n\n"),
        ("xabcdy", ["abcd", "bc"], "xa", "bc"),
        ("xabcy", ["abc", "bc", "c"], "x", "abc"),
        ("aaab", "aab", "a", "aab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("stop", ["stop"], "", "stop"),
        ("a 日本 語", ["本 "], "a 日", "本 "),
        ("go 😎 on", ["😎"], "go ", "😎"),
        ("all but", ["butt", "all but one"], "all but", None),
    ],
)
def test_stop_strings(byte_level, text, stop, expected, found):
    ids = byte_level.encode(text).ids
    for seed in range(20):
        got, stream = streamed(byte_level, ids, stop, seed)
        assert (got, stream.stopped) == (expected, found)


def test_the_stop_string_complete_first_wins_within_a_token(byte_level):
    assert byte_level.encode("path").tokens == ["path"]
    got, stream = streamed(byte_level, byte_level.encode("path").ids, ["path", "at"])
    assert (got, stream.stopped) == ("p", "at")


def test_stop_strings_in_random_text(byte_level):
    rng = random.Random(4)
    for seed in range(2000):
        text = "".join(rng.choices("abé\n", k=rng.randrange(25)))
        stops = ["".join(rng.choices("abé\n", k=rng.randrange(1, 6))) for _ in range(rng.randrange(4))]
        got, stream = streamed(byte_level, byte_level.encode(text).ids, stops, seed)
        assert (got, stream.stopped) == reference_stop(text, stops)


def test_what_may_become_a_stop_string_is_held_and_then_released(byte_level):
    stream = TextStream(byte_level, ["###"])
    pieces = [stream.push(byte_level.encode(text).ids) for text in ["a#", "#", "b#"]]
    assert pieces == ["a", "", "##b"]
    assert stream.finish() == "#"


def test_ids_after_a_stop_string_are_not_taken(byte_level):
    ids = byte_level.encode("xyz!abc").ids
    stream = TextStream(byte_level, "!")
    assert stream.push(ids) == "xyz"
    assert byte_level.decode(ids[: stream.taken]) == "xyz!"
    assert stream.push(ids) == stream.finish() == ""
    assert stream.taken == len(byte_level.encode("xyz!").ids)


def test_unfinished_bytes_can_complete_a_stop_string_at_the_end(byte_level):
    stream = TextStream(byte_level, "k\ufffd")
    assert stream.push(byte_level.encode("ok😎").ids[:-1]) == "o"
    assert stream.finish() == ""
    assert stream.stopped == "k\ufffd"


@pytest.mark.parametrize("stop", ["", ["a", ""], [1], 3, None])
def test_stop_must_be_strings_with_something_in_them(byte_level, stop):
    with pytest.raises(OptionError, match="stop: expected"):
        TextStream(byte_level, stop)
