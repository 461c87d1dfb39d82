"""Windows of a text, and which tokens of them are scored."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors

from xlathe.errors import OptionError
from xlathe.models import demo
from xlathe.tools.protocol import LLAMA_CPP, WINDOWS, beginning, cut, find_protocol

TOKENS = list(range(100, 1200))


def test_llama_cpp_begins_every_window_and_scores_its_second_half():
    windows = cut(LLAMA_CPP, TOKENS, [1], 4096, None)
    assert windows.shape == (2, 512) and windows.dtype == np.int32
    text = [1, *TOKENS]
    for i, window in enumerate(windows.tolist()):
        assert window == [1, *text[512 * i + 1 : 512 * (i + 1)]]
    assert 511 - LLAMA_CPP.first(512) == 255  # scored a window, as the tool counts
    assert "tokens 258 to 512 of each scored" in LLAMA_CPP.describe(512)


def test_whole_windows_begin_once():
    windows = cut(WINDOWS, TOKENS, [1], 300, None)
    assert windows.shape == (3, 300)
    assert windows.reshape(-1).tolist() == [1, *TOKENS][:900]
    assert WINDOWS.first(300) == 0 and "tokens 2 to 300" in WINDOWS.describe(300)


def test_no_beginning_replaces_nothing():
    assert cut(LLAMA_CPP, TOKENS, [], 4096, None).reshape(-1).tolist() == TOKENS[:1024]


@pytest.mark.parametrize(("context", "length"), [(None, 64), (16, 16)])
def test_windows_are_no_longer_than_a_model_takes(context, length):
    assert cut(LLAMA_CPP, TOKENS, [], 64, context).shape[1] == length


@pytest.mark.parametrize(
    ("count", "context", "message"),
    [
        (3, None, "the text has 3 tokens, expected at least 6"),
        (30, 16, "the text has 30 tokens, expected at least two windows of 16"),
        (300, 65, "context=65: expected 3 to 64"),
        (300, 2, "context=2: expected 3 to 64"),
    ],
)
def test_texts_and_lengths_that_do_not_fit(count, context, message):
    with pytest.raises(OptionError, match=message):
        cut(LLAMA_CPP, TOKENS[:count], [], 64, context)


def test_what_tokenizers_begin_a_text_with():
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "</s>": 2, "?": 3}, unk_token="?"))
    assert beginning(words) == beginning(demo.tokenizer()) == []
    for single, expected in {"<s> $A": [0], "$A </s>": [], "<s> $A </s>": [0]}.items():
        words.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        assert beginning(words) == expected


def test_unknown_protocols():
    with pytest.raises(OptionError, match="no protocol 'window'; did you mean 'windows'"):
        find_protocol("window")
