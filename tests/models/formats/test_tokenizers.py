"""Tokenizers read from others' files give the ids of the tokenizer that wrote them, for any text."""

import contextlib
import itertools
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from xlathe.card import Card
from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf_pre import PATTERNS, WHOLE_WORDS
from xlathe.models.formats.gguf_tokenizer import metadata_of, tokenizer_of
from xlathe.models.formats.tokenizer import read_chat_template, read_special_tokens, read_tokenizer

CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; it'll walk.\n\n  def f(x):\n\treturn x + 1\n",
    "日本語のテキストと漢字、naïve café Ünïcödé «quotes» — 3.14159 😀👍🏽",
    "HTTPServer camelCase snake_case don't WON'T we're I'm   many   spaces\r\nand lines",
] * 3
ENDS = ["<s>", "</s>", "<|turn|>"]
COMMON = st.sampled_from(" \n\r\t'aestTHE12309.,!?é漢字😀<s>|")
TEXT = st.text(COMMON | st.characters(exclude_categories=["Cs"]))
CARD = Card({"bos_token_id": 0, "eos_token_id": 1})
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_level(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=ENDS, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("  ", normalized=False)])
    return tokenizer


def sentence_pieces(prefix: bool) -> Tokenizer:
    """As transformers makes one of a Llama: the whole text is one word, characters without a token are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    special = [*ENDS, "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    words = [word for text in CORPUS[:1] for word in text.split()]
    trainer = trainers.BpeTrainer(vocab_size=430, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [each for each in data["added_tokens"] if not each["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=[*ENDS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


MADE = {
    **{pre: lambda pre=pre: byte_level(pre) for pre in ("gpt-2", "llama-bpe", "dbrx", "qwen2", "default")},
    **{pre: lambda pre=pre: byte_level(pre) for pre in ("starcoder", "falcon", "tekken", "gpt-4o", "bloom")},
    **{pre: lambda pre=pre: byte_level(pre) for pre in ("deepseek-llm", "deepseek-coder", "deepseek-v3")},
    "llama": lambda: sentence_pieces(prefix=True),
    "llama without prefix": lambda: sentence_pieces(prefix=False),
    "t5": unigram,
    "bert": word_pieces,
}


@pytest.mark.parametrize("name", MADE)
def test_gguf_metadata_rebuild_a_tokenizer(name: str) -> None:
    """Expected: the same ids and the same text back, for texts with special tokens too."""
    original = MADE[name]()
    metadata = metadata_of(original, CARD)
    rebuilt = tokenizer_of(metadata)
    assert rebuilt is not None and rebuilt.get_vocab_size() == original.get_vocab_size()
    assert metadata["tokenizer.ggml.model"] == {"llama without prefix": "llama"}.get(name, name) or name in PATTERNS
    assert metadata.get("tokenizer.ggml.pre", "default") == (name if name in PATTERNS else "default")

    @FUZZ
    @given(TEXT)
    def same(text: str) -> None:
        ids = original.encode(text).ids
        assert rebuilt.encode(text).ids == ids
        assert rebuilt.decode(ids) == original.decode(ids)
        assert rebuilt.encode(f"{text}<|turn|>{text}").ids == original.encode(f"{text}<|turn|>{text}").ids

    same()


def reference_bpe(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's algorithm written out: of all neighbors the pair whose piece scores highest, leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [a + b for a, b in itertools.pairwise(symbols)]
        pairs = [(-scores[text], i) for i, text in enumerate(joined) if text in scores]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_pieces_are_joined_by_their_scores() -> None:
    rng = random.Random(0)
    pieces = sorted({"".join(rng.choices("▁abc", k=rng.randrange(2, 5))) for _ in range(60)})
    letters = ["▁", "a", "b", "c"]
    scores = {text: -float(i) for i, text in enumerate(rng.sample(pieces, len(pieces)))}
    texts = ["<unk>", "<s>", "</s>", *letters, *scores]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *[-1000.0] * 4, *scores.values()],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (len(texts) - 3)],
    }
    tokenizer = tokenizer_of(metadata)
    assert tokenizer is not None
    for _ in range(500):
        text = "".join(rng.choices(" abc", k=rng.randrange(12)))
        expected = reference_bpe(text, scores)
        assert tokenizer.encode(text).tokens == ["<s>", *expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "gpt3"}, "model: no tokenizer 'gpt3'; did you mean 'gpt2'"),
        ({"pre": "qwen"}, "pre: how 'qwen' cuts text is not known; did you mean 'qwen2'"),
        ({"tokens": None}, "tokens: expected a list, found none"),
        ({"tokens": ["a", "a"]}, "tokens: expected texts that differ"),
        ({"merges": ["a b c"]}, "merges: expected pairs"),
        ({"merges": "ab"}, "merges: expected a list, found str"),
        ({"token_type": [1]}, "token_type: expected 259, one a token, found 1"),
        ({"token_type": ["x"] * 259}, "token_type: expected a list of int"),
        ({"add_bos_token": True, "bos_token_id": 10**9}, "bos_token_id: expected one of 259 ids, found 1000000000"),
        ({"model": "llama", "scores": [0.0]}, "scores: expected 259, one a token, found 1"),
    ],
)
def test_metadata_that_make_no_tokenizer(changes: dict, expected: str) -> None:
    tokens = [*ENDS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    good = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": []}
    assert tokenizer_of({f"tokenizer.ggml.{key}": value for key, value in good.items()}) is not None
    bad = {f"tokenizer.ggml.{key}": value for key, value in {**good, **changes}.items()}
    with pytest.raises(CheckpointError, match=expected):
        tokenizer_of(bad)
    assert tokenizer_of({}) is None and tokenizer_of({"tokenizer.ggml.model": "none"}) is None


def test_what_gguf_cannot_say_is_refused() -> None:
    cased = word_pieces()
    cased.normalizer = normalizers.BertNormalizer(lowercase=False)
    with pytest.raises(CheckpointError, match="lowers all letters"):
        metadata_of(cased, Card({}))
    other = byte_level("qwen2")
    cuts = [pre_tokenizers.Split("-", "isolated"), pre_tokenizers.ByteLevel(False)]
    other.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    with pytest.raises(CheckpointError, match="no name for how"):
        metadata_of(other, Card({}))
    with pytest.raises(CheckpointError, match="of the kind WordLevel"):
        metadata_of(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), Card({}))


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def test_tokenizer_json_and_its_settings(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None and read_chat_template(tmp_path) is None
    original = byte_level("qwen2")
    original.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path).encode("a b").ids == original.encode("a b").ids
    bos = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    write(tmp_path, "tokenizer_config.json", {**bos, "add_bos_token": True, "chat_template": "{{ 1 }}"})
    assert read_tokenizer(tmp_path).encode("a b").ids == [0, *original.encode("a b").ids]
    assert read_special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    assert read_chat_template(tmp_path) == "{{ 1 }}"
    original.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    original.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {**bos, "add_bos_token": False})
    assert read_tokenizer(tmp_path).encode("a b").ids == byte_level("qwen2").encode("a b").ids
    (tmp_path / "chat_template.jinja").write_text("{{ 2 }}")
    assert read_chat_template(tmp_path) == "{{ 2 }}"
    for bad in ("{", "[]", "[" * 100_000, '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
            read_tokenizer(tmp_path)
    for bad in ([{"name": "rag", "template": "x"}], 3, [3], [{"name": "default", "template": 3}]):
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        write(tmp_path, "tokenizer_config.json", {"chat_template": bad})
        with pytest.raises(CheckpointError, match="chat_template: expected"):
            read_chat_template(tmp_path)


def test_vocab_and_merges(tmp_path: Path) -> None:
    original = byte_level("gpt-2")
    original.model.save(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {
        str(i): {"content": t.content, "special": t.special} for i, t in original.get_added_tokens_decoder().items()
    }}  # fmt: skip
    write(tmp_path, "tokenizer_config.json", settings)
    found = read_tokenizer(tmp_path)
    for text in [*CORPUS, "a<|turn|>b"]:
        assert found.encode(text).ids == original.encode(text).ids
        assert found.decode(found.encode(text).ids) == original.decode(original.encode(text).ids)
    write(tmp_path, "tokenizer_config.json", {**settings, "added_tokens_decoder": {"9999": {"content": "<new>"}}})
    with pytest.raises(CheckpointError, match="'<new>' should have the id 9999, and gets"):
        read_tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BartTokenizer"})
    with pytest.raises(CheckpointError, match=r"how BartTokenizer splits text is not known. Make one: python -c"):
        read_tokenizer(tmp_path)


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_file(kind: int) -> bytes:
    """A SentencePiece file, written by hand from the message's definition."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{i:02X}>", 0.0, 6) for i in range(256))]
    pieces += [(text, -float(i), 1) for i, text in enumerate(["ab", "▁a", "▁ab", "▁", "a", "b"])]
    listed = b"".join(field(1, field(1, t.encode()) + field(2, s) + field(3, k)) for t, s, k in pieces)
    return listed + field(2, field(3, kind)) + field(3, field(3, 1) + field(4, 0))


def test_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file(2))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}
    settings["added_tokens_decoder"] = {"265": {"content": "<|end|>", "special": True}}
    write(tmp_path, "tokenizer_config.json", settings)
    found = read_tokenizer(tmp_path)
    assert found.encode("ab é").tokens == ["<s>", "▁ab", "▁", "<0xC3>", "<0xA9>"]
    assert found.decode(found.encode("ab é").ids) == "ab é"
    assert found.encode("b<|end|>").ids[-1] == 265
    (tmp_path / "tokenizer.model").write_bytes(model_file(1))
    assert read_tokenizer(tmp_path).encode("ab").tokens == ["<s>", "▁ab"]


def test_damaged_sentencepiece_models(tmp_path: Path) -> None:
    path, good = tmp_path / "tokenizer.model", model_file(2)
    for kind in (3, 4):
        path.write_bytes(model_file(kind))
        with pytest.raises(CheckpointError, match=f"found type {kind}"):
            read_tokenizer(tmp_path)
    rng, read = random.Random(5), 0
    for _ in range(300):
        at = rng.randrange(len(good))
        path.write_bytes(good[:at] if rng.random() < 0.5 else good[:at] + rng.randbytes(3) + good[at + 3 :])
        with contextlib.suppress(CheckpointError):  # and nothing else; a changed score is no damage to see
            read_tokenizer(tmp_path)
            read += 1
    assert read < 200


def test_sentencepiece_library_gives_the_same_ids(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    (tmp_path / "corpus").write_text("\n".join(CORPUS * 5))
    for kind in ("bpe", "unigram"):
        library.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type=kind,
            byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
        )  # fmt: skip
        theirs, ours = library.SentencePieceProcessor(str(tmp_path / "tokenizer.model")), read_tokenizer(tmp_path)

        check_same(theirs, ours)


def check_same(theirs: Any, ours: Tokenizer) -> None:
    @FUZZ
    @given(TEXT)
    def same(text: str) -> None:
        text = text.replace("<", "").replace("\0", "")
        assert ours.encode(text).ids == theirs.encode(text)

    same()
