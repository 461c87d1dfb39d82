"""What a Hugging Face directory says about text: its tokenizer, its special tokens and its chat template.

Files are read as data. Where a model has code of its own for text, it is not run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from xlathe.errors import CheckpointError
from xlathe.models.formats.gguf_pre import GPT2, QWEN2
from xlathe.models.formats.json_file import read_json
from xlathe.models.formats.sentencepiece import read_sentencepiece

TOKENIZER, VOCAB, MERGES, PIECES = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"
SETTINGS, SPECIAL, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
FILES = (TOKENIZER, VOCAB, MERGES, PIECES, SETTINGS, SPECIAL, TEMPLATE)
BYTE_LEVEL = {"GPT2Tokenizer": GPT2, "RobertaTokenizer": GPT2, "Qwen2Tokenizer": QWEN2}
BEGIN = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer")  # which add a beginning unless told not to


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer of a directory, None where there are no files of one.

    Of `tokenizer.json`, else `vocab.json` and `merges.txt` (byte-level BPE), else `tokenizer.model` (SentencePiece). It
    adds a beginning-of-text token where `tokenizer_config.json` says so. Raises CheckpointError, naming the file.
    """
    settings = _optional(folder / SETTINGS)
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    if (folder / TOKENIZER).exists():
        found = _load(folder / TOKENIZER)
    elif (folder / VOCAB).exists() and (folder / MERGES).exists():
        found = _byte_level(folder, kind)
        _add_tokens(found, settings, folder)
    elif (folder / PIECES).exists():
        found = read_sentencepiece(folder / PIECES)
        _add_tokens(found, settings, folder)
        settings = {"add_bos_token": kind in BEGIN, **settings}
    else:
        return None
    return _with_ends(found, settings, read_special_tokens(folder))


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Returns the texts of `bos_token`, `eos_token`, ...; those that are null are left out."""
    found = {**_optional(folder / SPECIAL), **_optional(folder / SETTINGS)}
    texts = {name: v.get("content") if isinstance(v, dict) else v for name, v in found.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def read_chat_template(folder: Path) -> str | None:
    """Returns the Jinja template. Of several named ones it is `tool_use` where tools are given, else `default`."""
    path = folder / TEMPLATE
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    found = _optional(folder / SETTINGS).get("chat_template")
    if found is None or isinstance(found, str):
        return found
    try:
        named = {str(each["name"]): each["template"] for each in found}
        default, tools = named["default"], named.get("tool_use")
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / SETTINGS}: chat_template: expected a text, or a list of named templates with one named "
            f"'default' ({error})"
        ) from None
    if not isinstance(default, str) or not isinstance(tools, str | None):
        raise CheckpointError(f"{folder / SETTINGS}: chat_template: expected texts")
    return default if tools is None else f"{{%+ if tools +%}}{tools}{{%+ else +%}}{default}{{%+ endif +%}}"


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _load(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is no tokenizer: {error}") from None


def _byte_level(folder: Path, kind: str) -> Tokenizer:
    if kind and kind not in BYTE_LEVEL:
        raise CheckpointError(
            f'{folder} has no {TOKENIZER}, and how {kind} splits text is not known. Make one: python -c "from '
            f"transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    try:
        model = models.BPE.from_file(str(folder / VOCAB), str(folder / MERGES))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{folder / VOCAB} and {MERGES} are no tokenizer: {error}") from None
    tokenizer = Tokenizer(model)
    if kind == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
    (pattern,) = BYTE_LEVEL.get(kind, GPT2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    """Adds the tokens that the settings name, with the ids that they say."""
    listed = settings.get("added_tokens_decoder", {})
    try:
        tokens = sorted((int(i), str(each["content"]), bool(each.get("special"))) for i, each in listed.items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / SETTINGS}: malformed added_tokens_decoder: {error}") from None
    for token, text, special in tokens:
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
        if tokenizer.token_to_id(text) != token:
            found = tokenizer.token_to_id(text)
            raise CheckpointError(f"{folder / SETTINGS}: {text!r} should have the id {token}, and gets {found}")


def _with_ends(tokenizer: Tokenizer, settings: Mapping[str, Any], special: Mapping[str, str]) -> Tokenizer:
    """Adds a beginning and an end to texts, or adds none, where the settings are explicit and it is not so already."""
    now = tokenizer.encode("").ids
    ids = {name: tokenizer.token_to_id(special.get(f"{name}_token", "")) for name in ("bos", "eos")}
    has = {"bos": now[:1] == [ids["bos"]], "eos": now[-1:] == [ids["eos"]]}
    wanted = {name: settings.get(f"add_{name}_token") for name in has}
    wanted = {
        name: has[name] if wish is None else bool(wish) and ids[name] is not None for name, wish in wanted.items()
    }
    if wanted != has:
        first, last = (special[f"{name}_token"] if wanted[name] else None for name in has)
        tokenizer.post_processor = with_ends(tokenizer, first, last)
    return tokenizer


def with_ends(tokenizer: Tokenizer, first: str | None, last: str | None) -> processors.TemplateProcessing:
    """Returns the processor that puts special tokens before and after a text."""
    ends = [text for text in (first, last) if text is not None]
    text = [*([] if first is None else [first]), "$A", *([] if last is None else [last])]
    return processors.TemplateProcessing(
        single=text, pair=[*text, *("$B" if each == "$A" else each for each in text)],
        special_tokens=[(each, tokenizer.token_to_id(each)) for each in dict.fromkeys(ends)],
    )  # fmt: skip
