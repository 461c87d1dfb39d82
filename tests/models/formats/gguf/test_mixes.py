"""Types by name and shape, beside what is published of files that llama.cpp wrote."""

import pytest

from xlathe.models.formats.gguf.mixes import MIXES, Counts, Type, bits_per_weight, types_of

LLAMAS = {
    "Llama-2-7B": ((32, 4096, 11008, 32000, 4096), Counts("llama", 32, 32, 32)),
    "Llama-3.1-8B": ((32, 4096, 14336, 128256, 1024), Counts("llama", 32, 32, 8)),
    "Llama-2-70B": ((80, 8192, 28672, 32000, 1024), Counts("llama", 80, 64, 8)),
}
# llama.cpp's README of `quantize` (Llama 3.1), and k-quants' pull request #1684 (Llama 2; of 70B the figures of its
# first files, whose Q3_K_M and Q4_K_S were larger by 0.02 at most, are left out, as is Q2_K, which was another mix).
PUBLISHED = {
    "Llama-2-7B": {
        "Q3_K_S": 3.50, "Q3_K_M": 3.91, "Q3_K_L": 4.27, "Q4_K_S": 4.58, "Q4_K_M": 4.84, "Q5_K_S": 5.52, "Q5_K_M": 5.68,
        "Q6_K": 6.56,
    },
    "Llama-3.1-8B": {
        "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944,
        "Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008,
    },
    "Llama-2-70B": {"Q3_K_S": 3.47, "Q3_K_L": 4.19, "Q4_K_M": 4.80, "Q5_K_S": 5.50, "Q5_K_M": 5.65, "Q6_K": 6.56},
}  # fmt: skip


def llama(layers: int, width: int, hidden: int, vocab: int, narrow: int, tied: bool = False):
    shapes = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    shapes |= {} if tied else {"output.weight": (vocab, width)}
    block = {
        "attn_norm": (width,), "attn_q": (width, width), "attn_k": (narrow, width), "attn_v": (narrow, width),
        "attn_output": (width, width), "ffn_norm": (width,), "ffn_gate": (hidden, width), "ffn_up": (hidden, width),
        "ffn_down": (width, hidden),
    }  # fmt: skip
    return shapes | {f"blk.{b}.{name}.weight": shape for b in range(layers) for name, shape in block.items()}


@pytest.mark.parametrize(("model", "mix"), [(model, mix) for model in PUBLISHED for mix in PUBLISHED[model]])
def test_bits_per_weight_are_the_published_ones(model, mix):
    sizes, counts = LLAMAS[model]
    shapes = llama(*sizes)
    found, published = bits_per_weight(shapes, types_of(mix, shapes, counts)), PUBLISHED[model][mix]
    digits = len(str(published).split(".")[1])
    assert round(found, max(digits, 2)) == published


def layers_of(types: dict[str, Type], part: str, type: Type) -> list[int]:
    return [int(name.split(".")[1]) for name in types if f".{part}." in name and types[name] is type]


def test_half_of_the_layers_of_q4_k_m_have_more_bits():
    sizes, counts = LLAMAS["Llama-3.1-8B"]
    types = types_of("Q4_K_M", llama(*sizes), counts)
    for part in ("attn_v", "ffn_down"):
        assert layers_of(types, part, Type.Q6_K) == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert types["output.weight"] is Type.Q6_K and types["token_embd.weight"] is Type.Q4_K


def test_layers_are_counted_in_their_order_whatever_the_file_s():
    sizes, counts = LLAMAS["Llama-3.1-8B"]
    shapes = llama(*sizes)
    turned = dict(reversed(shapes.items()))
    for mix in MIXES:
        assert types_of(mix, turned, counts) == types_of(mix, shapes, counts)


def test_an_embedding_that_is_the_head_too_has_its_type():
    shapes = llama(4, 256, 512, 1000, 256, tied=True)
    counts = Counts("llama", 4, 4, 4)
    for mix, expected in {"Q2_K": "Q6_K", "Q4_0": "Q6_K", "Q8_0": "Q8_0", "F16": "F16"}.items():
        assert types_of(mix, shapes, counts)["token_embd.weight"].name == expected


@pytest.mark.parametrize(
    ("mix", "width", "expected"),
    [
        ("Q4_K_S", 288, "Q5_0"),
        ("Q5_K_S", 288, "Q5_1"),
        ("Q3_K_S", 288, "Q4_0"),
        ("IQ4_XS", 288, "IQ4_NL"),
        ("Q6_K", 288, "Q8_0"),
        ("Q6_K", 80, "F16"),
        ("Q4_0", 80, "F16"),
        ("Q4_0", 288, "Q4_0"),
    ],
)
def test_rows_that_are_no_whole_blocks_have_a_type_that_fits(mix, width, expected):
    shapes = llama(8, width, 4 * width, 1000, width)
    types = types_of(mix, shapes, Counts("llama", 8, 4, 4))
    assert types["blk.3.attn_q.weight"].name == expected
    assert types["output.weight"].name == ("F16" if width == 80 else "Q8_0")


def test_importance_spares_the_first_layers_of_q4_0():
    shapes, counts = llama(16, 256, 512, 1000, 256), Counts("llama", 16, 4, 4)
    assert layers_of(types_of("Q4_0", shapes, counts, importance=True), "ffn_down", Type.Q4_1) == [0, 1]
    assert layers_of(types_of("Q5_0", shapes, counts, importance=True), "ffn_down", Type.Q5_1) == [0, 1]
    assert layers_of(types_of("Q4_0", shapes, counts), "ffn_down", Type.Q4_1) == []


def test_eight_experts_keep_attention_wide():
    shapes = llama(8, 256, 512, 1000, 256)
    types = types_of("Q4_K_M", shapes, Counts("llama", 8, 4, 4, experts=8))
    assert {types[f"blk.{b}.attn_{part}.weight"] for b in range(8) for part in "vk"} == {Type.Q8_0}
    assert types["blk.5.attn_output.weight"] is Type.Q5_K
