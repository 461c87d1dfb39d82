"""What a checkpoint says about a model beside its weights; a graph and a bundle carry it along."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Card:
    """The settings of a pretrained model, in Hugging Face's vocabulary whatever files it came from.

    config: as `config.json` says (`model_type`, sizes, ...); generation: as `generation_config.json` says
    (`eos_token_id`, ...), empty where there is none; chat_template: the Jinja template that makes a prompt of messages.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The ids that end a text: `eos_token_id`, one or several, of `generation` or else of `config`."""
        found = self.generation.get("eos_token_id", self.config.get("eos_token_id"))
        if found is None:
            return ()
        return tuple(found) if isinstance(found, list | tuple) else (found,)
