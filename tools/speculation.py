"""What drafts do for the speed of decoding: the same prompts with and without them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xlathe.program import Completion, Program
from xlathe.tools.scores import Progress


@dataclass(frozen=True)
class Drafted:
    """A way of drafting beside plain decoding of the same graph.

    plain, decode: tokens a second over all prompts; ratio: median over prompts; tokens_per_step, and acceptance by
    place: means over prompts; same_text: prompts of which the completion is that of plain decoding, token by token.
    """

    pipeline: str
    drafter: str
    gamma: int
    plain: float
    decode: float
    ratio: float
    tokens_per_step: float
    acceptance: tuple[float, ...]
    same_text: int
    prompts: int

    @property
    def name(self) -> str:
        return f"{self.pipeline} {self.drafter} x {self.gamma}"


def in_turns(
    programs: Sequence[Program],
    prompts: Sequence[Sequence[int]],
    progress: Progress,
    **options: Any,
) -> list[list[Completion]]:
    """Completes every prompt, a row of token ids, with every program; returns a list a program.

    All take turns on each prompt, so that a disturbance of the machine meets them alike; a first call does not count.
    """
    found: list[list[Completion]] = [[] for _ in programs]
    for program in programs:
        program.generate([prompts[0]], **options)
    for i, prompt in enumerate(prompts):
        progress("measure speculation", i / len(prompts))
        for program, completions in zip(programs, found, strict=True):
            completions += program.generate([prompt], **options)
    return found


def judge(
    pipeline: str, drafter: str, gamma: int, plain: Sequence[Completion], drafted: Sequence[Completion]
) -> Drafted:
    """Compares completions of the same prompts."""
    pairs = list(zip(plain, drafted, strict=True))
    return Drafted(
        pipeline,
        drafter,
        gamma,
        tokens_per_second(plain),
        tokens_per_second(drafted),
        float(np.median([a.stats.decode_seconds / b.stats.decode_seconds for a, b in pairs])),
        float(np.mean([c.stats.tokens_per_step for c in drafted])),
        tuple(np.mean([c.stats.acceptance for c in drafted], axis=0).tolist()),
        sum(a.tokens == b.tokens for a, b in pairs),
        len(pairs),
    )


def tokens_per_second(completions: Sequence[Completion]) -> float:
    stats = [completion.stats for completion in completions]
    return sum(each.new_tokens for each in stats) / sum(each.decode_seconds for each in stats)
