"""For every kind of tokenizer the pieces of a stream are, joined, the text that the library decodes at once."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from xlathe.decode.text import INCOMPLETE, TextStream

LINES = ["The fox doesn't jump. It'll walk, 12 times!", "日本語と漢字 naïve café", "😀👍🏽 many   spaces\n\nand lines"]
CORPUS = LINES * 3
TEXT = st.text(st.sampled_from(" \n'aestTHE12.,!?é漢字😀ẅ̈") | st.characters(exclude_categories=["Cs"]), max_size=40)
SPECIAL = ["<s>", "<unk>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As of a Llama: the decoder drops the first space, and characters without a token are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:1], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:2]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: list[Callable[[], Tokenizer]] = [byte_level, byte_fallback, metaspace, word_pieces]


def check(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> None:
    """The pieces of any division into pushes are the text, and nothing that a piece shows is taken back."""
    stream, pieces, start = TextStream(tokenizer), [], 0
    for cut in [*sorted(min(cut, len(ids)) for cut in cuts), len(ids)]:
        pieces.append(stream.push(ids[start:cut]))
        start = cut
        assert not pieces[-1].endswith(INCOMPLETE)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("make", KINDS)
def test_texts_stream_to_what_they_decode_to(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()

    @settings(max_examples=150, deadline=None)
    @given(TEXT, st.lists(st.integers(0, 60), max_size=8))
    def streams(text: str, cuts: list[int]) -> None:
        check(tokenizer, tokenizer.encode(text).ids, cuts)

    streams()


@pytest.mark.parametrize("make", [byte_level, metaspace, word_pieces])
def test_any_ids_stream_to_what_they_decode_to(make: Callable[[], Tokenizer]) -> None:
    """Special tokens and bytes that are no text among them; byte-fallback has a test of its own in test_text.py."""
    tokenizer = make()
    ids = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30)

    @settings(max_examples=150, deadline=None)
    @given(ids, st.lists(st.integers(0, 30), max_size=8))
    def streams(ids: list[int], cuts: list[int]) -> None:
        check(tokenizer, ids, cuts)

    streams()


def test_only_the_first_space_is_dropped() -> None:
    tokenizer = byte_fallback()
    stream = TextStream(tokenizer)
    ids = [tokenizer.token_to_id(piece) for piece in ["▁", "T", "▁", "T"]]
    assert [stream.push([token]) for token in ids] == ["", "T", " ", "T"]
