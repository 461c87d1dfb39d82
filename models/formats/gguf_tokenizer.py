"""The tokenizer in the metadata of a GGUF file, as llama.cpp understands it (`tokenizer.ggml.*`), both ways."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from xlathe.card import Card
from xlathe.chat import special_tokens
from xlathe.errors import CheckpointError, did_you_mean
from xlathe.models.formats.gguf_pre import GPT2, PATTERNS, WHOLE_WORDS, Patterns, name_of
from xlathe.models.formats.pieces import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Pieces, add_kinds, bpe
from xlathe.models.formats.pieces import unigram as unigram_of
from xlathe.models.formats.tokenizer import with_ends

KEY = "tokenizer.ggml."
KINDS = ("gpt2", "llama", "bert", "t5")
Metadata = Mapping[str, Any]


def tokenizer_of(metadata: Metadata) -> Tokenizer | None:
    """Returns the tokenizer that the metadata of a file describe, None where they say that there is none.

    Raises CheckpointError for a kind or a way to cut text (`tokenizer.ggml.pre`) that is not known, and for lists that
    are missing, malformed or of different lengths.
    """
    kind = metadata.get(f"{KEY}model", "none")
    if not isinstance(kind, str):
        raise CheckpointError(f"{KEY}model: expected a text, found {type(kind).__name__}")
    if kind == "none":
        return None
    builders = dict(zip(KINDS, (_byte_level, _sentence_pieces, _word_pieces, _unigram), strict=True))
    if kind not in builders:
        raise CheckpointError(f"{KEY}model: no tokenizer {kind!r}{did_you_mean(kind, builders)}")
    texts = _list(metadata, "tokens", str)
    if len(set(texts)) != len(texts) or not texts:
        raise CheckpointError(f"{KEY}tokens: expected texts that differ, found none or some twice")
    try:
        tokenizer = builders[kind](metadata, texts)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{KEY}*: these are no {kind} tokenizer: {error}") from None
    if tokenizer.post_processor is None:
        _add_ends(tokenizer, metadata, texts, str(kind))
    return tokenizer


def _byte_level(metadata: Metadata, texts: list[str]) -> Tokenizer:
    pre = str(metadata.get(f"{KEY}pre", "default"))
    if pre not in PATTERNS:
        raise CheckpointError(f"{KEY}pre: how {pre!r} cuts text is not known{did_you_mean(pre, PATTERNS)}")
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str)]
    if not all(len(merge) == 2 for merge in merges):
        raise CheckpointError(f"{KEY}merges: expected pairs of texts with a space between them")
    vocab = {text: i for i, text in enumerate(texts)}
    known = [pair for pair in merges if all(t in vocab for t in (*pair, "".join(pair)))]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=known, ignore_merges=pre in WHOLE_WORDS))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add_kinds(tokenizer, texts, _kinds(metadata, texts))
    return tokenizer


def _sentence_pieces(metadata: Metadata, texts: list[str]) -> Tokenizer:
    return bpe(_pieces(metadata, texts))


def _unigram(metadata: Metadata, texts: list[str]) -> Tokenizer:
    return unigram_of(_pieces(metadata, texts))


def _pieces(metadata: Metadata, texts: list[str]) -> Pieces:
    scores = _list(metadata, "scores", float)
    if len(scores) != len(texts):
        raise CheckpointError(f"{KEY}scores: expected {len(texts)}, one a token, found {len(scores)}")
    prefix = bool(metadata.get(f"{KEY}add_space_prefix", True))
    trim = bool(metadata.get(f"{KEY}remove_extra_whitespaces", False))
    charsmap = bytes(bytearray(x & 0xFF for x in _list(metadata, "precompiled_charsmap", int, [])))
    return Pieces(texts, scores, _kinds(metadata, texts), prefix, trim, charsmap)


def _word_pieces(metadata: Metadata, texts: list[str]) -> Tokenizer:
    """A piece that begins a word is marked, and one that goes on is not; the library has it the other way round."""
    special = {CONTROL, UNKNOWN, USER_DEFINED}
    kinds = [
        CONTROL if t.startswith("[") and t.endswith("]") else k
        for t, k in zip(texts, _kinds(metadata, texts), strict=True)
    ]
    plain = [
        t if k in special else t[1:] if t.startswith(SPACE) else f"##{t}" for t, k in zip(texts, kinds, strict=True)
    ]
    unknown, first, last = (
        texts[_id(metadata, name, texts, default)]
        for name, default in (("unknown", 100), ("cls", metadata.get(f"{KEY}bos_token_id", 101)), ("seperator", 102))
    )
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(plain)}, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    add_kinds(tokenizer, plain, kinds)
    tokenizer.post_processor = with_ends(tokenizer, first, last)
    return tokenizer


def _add_ends(tokenizer: Tokenizer, metadata: Metadata, texts: list[str], kind: str) -> None:
    begins = kind == "llama" or metadata.get(f"{KEY}pre") in WHOLE_WORDS
    ends: list[str | None] = []
    for name, default in (("bos", begins), ("eos", kind == "t5")):
        wanted = metadata.get(f"{KEY}add_{name}_token", default)
        token = metadata.get(f"{KEY}{name}_token_id", {"bos": 1, "eos": 2}[name] if kind == "llama" else None)
        ends.append(texts[_checked(name, token, texts)] if wanted and token is not None else None)
    if any(ends):
        tokenizer.post_processor = with_ends(tokenizer, *ends)


def _id(metadata: Metadata, name: str, texts: Sequence[str], default: Any) -> int:
    return _checked(name, metadata.get(f"{KEY}{name}_token_id", default), texts)


def _checked(name: str, token: Any, texts: Sequence[str]) -> int:
    if not isinstance(token, int) or not 0 <= token < len(texts):
        raise CheckpointError(f"{KEY}{name}_token_id: expected one of {len(texts)} ids, found {token!r}")
    return token


def _kinds(metadata: Metadata, texts: Sequence[str]) -> list[int]:
    kinds = _list(metadata, "token_type", int, [NORMAL] * len(texts))
    if len(kinds) != len(texts):
        raise CheckpointError(f"{KEY}token_type: expected {len(texts)}, one a token, found {len(kinds)}")
    return kinds


def _list(metadata: Metadata, name: str, kind: type, default: list[Any] | None = None) -> list[Any]:
    found = metadata.get(KEY + name, default)
    if found is None or isinstance(found, str | bytes):
        raise CheckpointError(
            f"{KEY}{name}: expected a list, found {'none' if found is None else type(found).__name__}"
        )
    try:
        return [kind(each) for each in found]
    except (TypeError, ValueError, UnicodeDecodeError):
        raise CheckpointError(f"{KEY}{name}: expected a list of {kind.__name__}") from None


def metadata_of(tokenizer: Tokenizer, card: Card) -> dict[str, Any]:
    """Returns the metadata from which llama.cpp, and `tokenizer_of`, rebuild a tokenizer.

    Raises CheckpointError where they cannot say what the tokenizer does.
    """
    data = json.loads(tokenizer.to_str())
    model, size = data["model"], tokenizer.get_vocab_size()
    found = [tokenizer.id_to_token(i) for i in range(size)]
    texts = [text for text in found if text is not None]
    if len(texts) < size:
        raise CheckpointError(f"the tokenizer has no token {found.index(None)}: GGUF numbers tokens without gaps")
    kinds = _kinds_of(tokenizer, texts, model)
    writers = {"BPE": _write_bpe, "Unigram": _write_unigram, "WordPiece": _write_word_pieces}
    if model["type"] not in writers:
        raise CheckpointError(f"GGUF has no tokenizer of the kind {model['type']}")
    ids = {f"{KEY}{name}_token_id": tokenizer.token_to_id(text) for name, text in _names(card, tokenizer).items()}
    if UNKNOWN in kinds:  # which llama.cpp takes to be 0 or 2 where nothing is said
        ids[f"{KEY}unknown_token_id"] = kinds.index(UNKNOWN)
    empty = tokenizer.encode("").ids
    begins = bool(empty) and empty[0] == ids.get(f"{KEY}bos_token_id")
    ends = bool(empty) and empty[-1] == ids.get(f"{KEY}eos_token_id")
    return {
        f"{KEY}token_type": kinds,
        f"{KEY}add_bos_token": begins,
        f"{KEY}add_eos_token": ends,
        **{key: token for key, token in ids.items() if token is not None},
        **writers[model["type"]](data, texts, kinds, tokenizer),
    }


def _names(card: Card, tokenizer: Tokenizer) -> dict[str, str]:
    names = {"unk": "unknown", "pad": "padding"}
    found = {name.removesuffix("_token"): text for name, text in special_tokens(card, tokenizer).items()}
    return {names.get(name, name): text for name, text in found.items() if name in ("bos", "eos", "unk", "pad")}


def _kinds_of(tokenizer: Tokenizer, texts: Sequence[str], model: Mapping[str, Any]) -> list[int]:
    added = {
        token.content: CONTROL if token.special else USER_DEFINED
        for token in tokenizer.get_added_tokens_decoder().values()
    }
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = texts[model["unk_id"]]
    bytes_ = {f"<0x{i:02X}>" for i in range(256)} if model.get("byte_fallback") else set()
    return [UNKNOWN if t == unknown else BYTE if t in bytes_ else added.get(t, NORMAL) for t in texts]


def _write_bpe(data: Mapping[str, Any], texts: list[str], kinds: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in data["model"]["merges"]]
    if data["model"].get("byte_fallback"):
        return _write_sentence_pieces(data, texts, merges)
    patterns = _patterns(data["pre_tokenizer"])
    pre = None if patterns is None else name_of(patterns, bool(data["model"].get("ignore_merges")))
    if pre is None or data["normalizer"] not in (None, {"type": "NFC"}):
        raise CheckpointError("GGUF has no name for how this tokenizer cuts text into words")
    lists = {f"{KEY}tokens": texts, f"{KEY}merges": [" ".join(pair) for pair in merges]}
    return {f"{KEY}model": "gpt2", f"{KEY}pre": pre, **lists}


def _patterns(pre: Mapping[str, Any] | None) -> Patterns | None:
    """Returns the regular expressions of a byte-level pre-tokenizer, None where it is another."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    found: list[str] = []
    for step in steps[:-1]:
        if step["type"] == "Digits" and step["individual_digits"]:
            found.append(r"\p{N}")
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
            pattern = str(step["pattern"].get("Regex"))
            found.append(pattern.replace("\r", r"\r").replace("\n", r"\n"))  # which some files hold as they are
        else:
            return None
    return (*found, *(GPT2 if steps[-1]["use_regex"] else ()))


def _write_sentence_pieces(data: Mapping[str, Any], texts: list[str], merges: list[tuple[str, ...]]) -> dict[str, Any]:
    """A piece's score is the turn of the first pair that makes it, so that pairs are joined in the same order."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(text, len(merges))) for text in texts]
    steps = _steps(data["normalizer"], "normalizers")
    pre = data["pre_tokenizer"] or {"type": "none"}
    kinds = {step["type"] for step in steps}
    cut = pre["type"] == "Metaspace" and pre.get("split", True)
    if cut or pre["type"] not in ("none", "Metaspace", "Split") or kinds - {"Prepend", "Replace"}:
        raise CheckpointError("GGUF has no name for how this tokenizer normalizes and cuts text")
    prefix = "Prepend" in kinds or pre.get("prepend_scheme") in ("always", "first")
    lists = {f"{KEY}tokens": texts, f"{KEY}scores": scores}
    return {f"{KEY}model": "llama", f"{KEY}pre": "default", **lists, f"{KEY}add_space_prefix": prefix}


def _steps(data: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    return [] if data is None else list(data[name]) if data["type"] == "Sequence" else [data]


def _write_unigram(data: Mapping[str, Any], texts: list[str], kinds: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
    pre = data["pre_tokenizer"] or {"type": "none"}
    if data["normalizer"] is not None or pre["type"] != "Metaspace" or not pre.get("split", True):
        raise CheckpointError(
            "GGUF's t5 tokenizer is written for texts that are cut at spaces and not normalized alone"
        )
    scores = [float(score) for _, score in data["model"]["vocab"]]
    scores += [0.0] * (len(texts) - len(scores))
    prefix = pre["prepend_scheme"] != "never"
    return {f"{KEY}model": "t5", f"{KEY}tokens": texts, f"{KEY}scores": scores, f"{KEY}add_space_prefix": prefix}


def _write_word_pieces(
    data: Mapping[str, Any], texts: list[str], kinds: list[int], tokenizer: Tokenizer
) -> dict[str, Any]:
    normalizer = data["normalizer"] or {}
    if (
        normalizer.get("type") != "BertNormalizer"
        or not normalizer["lowercase"]
        or normalizer["strip_accents"] is False
    ):
        raise CheckpointError("GGUF's bert tokenizer lowers all letters and strips accents, which this one does not")
    special = {CONTROL, UNKNOWN, USER_DEFINED}
    marked = [
        t if k in special else t[2:] if t.startswith("##") else SPACE + t for t, k in zip(texts, kinds, strict=True)
    ]
    ends = tokenizer.encode("").ids
    if len(ends) != 2 or not isinstance(
        tokenizer.post_processor, processors.TemplateProcessing | processors.BertProcessing
    ):
        raise CheckpointError(
            "GGUF's bert tokenizer puts one token before a text and one after it, which this one does not"
        )
    unknown = tokenizer.token_to_id(data["model"]["unk_token"])
    first = {f"{KEY}{name}_token_id": ends[0] for name in ("bos", "cls")}  # llama.cpp begins with either, by its age
    ids = {**first, f"{KEY}unknown_token_id": unknown, f"{KEY}seperator_token_id": ends[1]}
    return {f"{KEY}model": "bert", f"{KEY}tokens": marked, **ids}
