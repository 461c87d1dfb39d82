r"""How byte-level BPE cuts a text into words, by the names that `tokenizer.ggml.pre` has for it.

Regular expressions are applied one after the other, each to what the former left, as llama.cpp applies them.
They end with what takes the spaces that remain, which llama.cpp leaves to its loop.
"""

from collections.abc import Mapping
from typing import Final

Patterns = tuple[str, ...]

_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = rf"\s*[\r\n]+|{_SPACES}"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

GPT2: Final = (rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",)
LLAMA3: Final = (rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_LINES}",)
QWEN2: Final = (rf"{_SUFFIXES}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_LINES}",)
DEFAULT: Final = (r"[\p{P}\$\+<=>\^~\|]+", *GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
DIGITS: Final = (r"\p{N}", *GPT2)
FALCON: Final = (r"[\p{P}\$\+<=>\^~\|`]+", *GPT2, r"[0-9][0-9][0-9]")
TEKKEN: Final = ("|".join([*_CASED, r"\p{N}", _PATHS, _LINES]),)
GPT4O: Final = ("|".join([*(f"{each}{_SUFFIXES}?" for each in _CASED), r"\p{N}{1,3}", _PATHS, _LINES]),)
DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
DEEPSEEK_LLM: Final = (
    r"[\r\n]",
    # some of these letters are not what they normalize to, hence by their numbers
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134"
    r"ℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",  # noqa: RUF001
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",  # noqa: RUF001
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
DEEPSEEK_V3: Final = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
    r'[!"#$%&\x27()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|'
    + _LINES,
)
BLOOM: Final = (r" ?[^(\s|.,!?…。，、।۔،)]+",)  # noqa: RUF001

_NAMES: Final[Mapping[Patterns, str]] = {
    GPT2: "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais "
    "trillion granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe",
    LLAMA3: "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe",
    QWEN2: "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan megrez solar-open grok-2",
    DEFAULT: "default",
    DIGITS: "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    FALCON: "falcon",
    TEKKEN: "tekken",
    GPT4O: "gpt-4o llama4 kanana2 talkie minimax-m2",
    DEEPSEEK_CODER: "deepseek-coder",
    DEEPSEEK_LLM: "deepseek-llm",
    DEEPSEEK_V3: "deepseek-v3 hunyuan-dense joyai-llm",
    BLOOM: "bloom poro-chat gpt3-finnish",
}
PATTERNS: Final[Mapping[str, Patterns]] = {name: p for p, names in _NAMES.items() for name in names.split()}
WHOLE_WORDS: Final = frozenset(
    ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"]
)
"""A word that is a token is that token, whatever merges would make of it; and texts get a beginning, unless said."""


def name_of(patterns: Patterns, whole_words: bool) -> str | None:
    """Returns the first name of a way to cut text, None where it has none."""
    names = [name for name, each in PATTERNS.items() if each == patterns and (name in WHOLE_WORDS) == whole_words]
    return names[0] if names else None
