"""Opens what holds a checkpoint, whatever its format."""

import importlib.util
import os
import re
from pathlib import Path

from xlathe.errors import CheckpointError, as_path, brief
from xlathe.models.checkpoint import Checkpoint
from xlathe.models.formats.huggingface import read_huggingface


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Opens a GGUF file, or a Hugging Face directory, on disk or by its name on the hub.

    Raises CheckpointError where there is none, or what is there is damaged.
    """
    path = as_path(source, CheckpointError)
    try:
        path.stat()
    except FileNotFoundError:
        return read_huggingface(_download(str(source)))
    except (OSError, ValueError) as error:  # too long a name, or one with a NUL
        raise CheckpointError(f"{brief(str(source))} cannot be opened: {type(error).__name__}") from None
    if path.is_dir():
        return read_huggingface(path)
    from xlathe.models.formats.gguf import read_gguf  # it imports the package gguf

    return read_gguf(path)


def open_adapted(source: str) -> Checkpoint:
    """Opens `base`, or `base+adapter`: a checkpoint and the directory, or the hub's name, of a LoRA adapter on it.

    Raises CheckpointError as `open_checkpoint` and `fold_adapter` do.
    """
    base, plus, adapter = source.rpartition("+")
    if not plus or Path(source).exists():
        return open_checkpoint(source)
    from xlathe.models.formats.adapter import fold_adapter

    folder = Path(adapter)
    return fold_adapter(open_checkpoint(base), folder if folder.exists() else _download(adapter))


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name} does not exist")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{name} is no directory here. To fetch it from the hub: pip install huggingface_hub, then the same "
            f"again; or: hf download {name} --local-dir {name.split('/')[1]}"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # what the library raises derives from these
        raise CheckpointError(f"{name} cannot be fetched from the hub: {str(error).splitlines()[0]}") from None
