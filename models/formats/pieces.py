"""Tokenizers of the SentencePiece kind, from pieces with scores: of a `tokenizer.model` or of a GGUF file.

SentencePiece's BPE joins, again and again, the two neighbors whose joined piece has the highest score. The library
`tokenizers` joins by a list of pairs; ordered by those scores, it does the same.
(Kudo & Richardson, "SentencePiece", 2018.)
"""

import dataclasses
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the numbers in both formats


@dataclasses.dataclass(frozen=True)
class Pieces:
    """One text, score and kind an id. prefix: whether a space is put before every text; trim: whether runs of spaces
    become one, and those at the ends none; charsmap: SentencePiece's compiled normalization, or empty.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    prefix: bool = True
    trim: bool = False
    charsmap: bytes = b""

    @property
    def unknown(self) -> int | None:
        return next((i for i, kind in enumerate(self.kinds) if kind == UNKNOWN), None)


def bpe(pieces: Pieces) -> Tokenizer:
    """Returns SentencePiece's BPE; characters without a piece become bytes where there are pieces for bytes."""
    vocab = {text: i for i, text in enumerate(pieces.texts)}
    unknown = None if pieces.unknown is None else pieces.texts[pieces.unknown]
    model = models.BPE(
        vocab=vocab,
        merges=_merges(pieces, vocab),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=BYTE in pieces.kinds,
    )
    tokenizer = Tokenizer(model)
    prepend = [normalizers.Prepend(SPACE)] if pieces.prefix else []
    tokenizer.normalizer = normalizers.Sequence([*_cleaning(pieces), *prepend, normalizers.Replace(" ", SPACE)])
    return _finished(tokenizer, pieces)


def unigram(pieces: Pieces) -> Tokenizer:
    """Returns SentencePiece's Unigram model: the likeliest way to cut a text."""
    scored = list(zip(pieces.texts, pieces.scores, strict=True))
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=pieces.unknown, byte_fallback=BYTE in pieces.kinds))
    if cleaning := _cleaning(pieces):
        tokenizer.normalizer = normalizers.Sequence(cleaning)
    scheme = "always" if pieces.prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True)
    return _finished(tokenizer, pieces)


def add_kinds(tokenizer: Tokenizer, texts: Sequence[str], kinds: Sequence[int]) -> None:
    """Makes control pieces special, and finds those that a user defined before anything else is cut."""
    special = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    tokens = [
        AddedToken(text, special=special[kind], normalized=False)
        for text, kind in zip(texts, kinds, strict=True)
        if kind in special and text
    ]
    tokenizer.add_tokens(tokens)
    tokenizer.add_special_tokens([token for token in tokens if token.special])


def _cleaning(pieces: Pieces) -> list[normalizers.Normalizer]:
    mapped = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    trimmed = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()] if pieces.trim else []
    return [*mapped, *trimmed]


def _finished(tokenizer: Tokenizer, pieces: Pieces) -> Tokenizer:
    first = [decoders.Strip(" ", 1, 0)] if pieces.prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *first]
    tokenizer.decoder = decoders.Sequence(steps)
    add_kinds(tokenizer, pieces.texts, pieces.kinds)
    return tokenizer


def _merges(pieces: Pieces, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Returns the pairs whose joined piece exists, the highest score first."""
    found = []
    for text, score, kind in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True):
        if kind in (NORMAL, USER_DEFINED, UNUSED):
            cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
            found += [(-score, pair) for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    found.sort(key=lambda each: each[0])
    return [pair for _, pair in found]
