"""Tables of the architectures, and which of them a file or a config is of."""

from typing import Final

from xlathe.models.formats.gguf.architecture import Architecture
from xlathe.models.formats.gguf.architectures.bert import BERT
from xlathe.models.formats.gguf.architectures.deepseek import DEEPSEEK2
from xlathe.models.formats.gguf.architectures.gemma import GEMMA2, GEMMA3
from xlathe.models.formats.gguf.architectures.gpt import GPT2, GPTNEOX
from xlathe.models.formats.gguf.architectures.llama import LLAMA
from xlathe.models.formats.gguf.architectures.phi3 import PHI3
from xlathe.models.formats.gguf.architectures.qwen import QWEN2, QWEN3, QWEN3MOE

ARCHITECTURES: Final[tuple[Architecture, ...]] = (
    LLAMA, QWEN2, QWEN3, QWEN3MOE, GEMMA2, GEMMA3, PHI3, GPT2, GPTNEOX, DEEPSEEK2, BERT,
)  # fmt: skip
BY_NAME: Final = {architecture.name: architecture for architecture in ARCHITECTURES}
BY_MODEL_TYPE: Final = {kind: architecture for architecture in ARCHITECTURES for kind in architecture.model_types}
