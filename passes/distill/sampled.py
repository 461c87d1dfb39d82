"""Rows that the student goes on with itself, so that it learns where its own text leads it."""

import dataclasses
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from xlathe.errors import OptionError
from xlathe.graph import Graph
from xlathe.passes.distill.objective import CrossEntropy
from xlathe.passes.distill.step import Lesson, Settings, trained_names
from xlathe.program import Program, compile


@final
@dataclasses.dataclass(frozen=True)
class Sampler:
    """A student compiled for sampling, whose weights are given at each call.

    prompt: so many tokens of a row are the text's; count: so many follow, at temperature 1, past the end of a text too.
    """

    program: Program
    prompt: int
    count: int

    def go_on(
        self, weights: Mapping[str, Any], tokens: np.ndarray, mask: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens int32 [rows, t + 1], the first half of each row and what the student writes after it, and the
        mask [rows, t] of what it wrote: Agarwal et al. 2023, https://arxiv.org/abs/2306.13649.

        tokens, mask: of rows of the text, as in `Rows`; what follows a prompt that is not whole is not learned.
        weights: of the student, in its dtypes. The last token is padding.
        """
        program = dataclasses.replace(self.program, arrays=self._arrays(weights))
        prompts = tokens[:, : self.prompt]
        done = program.generate(prompts, max_tokens=self.count, temperature=1.0, seed=seed)
        written = np.asarray([each.tokens for each in done], np.int32)
        place = np.arange(mask.shape[1])
        own = (place >= self.prompt - 1) & (place < mask.shape[1] - 1)
        there = np.pad(mask, ((0, 0), (1, 0)), constant_values=True)[:, self.prompt - 1, None]
        return np.pad(np.concatenate([prompts, written], 1), ((0, 0), (0, 1))), own & there

    def _arrays(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the program takes, made of these weights as it was of the first ones."""
        step = self.program.step
        assert step is not None  # it was compiled here
        stored = ChainMap(dict(weights), step.weights.stored)  # type: ignore[arg-type]
        made = dataclasses.replace(step.weights, stored=stored).prepare(list(step.names("weight")))
        return {**self.program.arrays, **{name: jnp.asarray(array) for name, array in made.items()}}


def make_sampler(student: Graph, rows: int, length: int) -> Sampler:
    """Compiles a student for rows of this length; the first half of each is the text's."""
    named = student.with_weights({name: student.arrays[name] for name in trained_names(student)})
    prompt, count = length // 2, length - length // 2
    program = compile(named, max_batch=rows, max_len=length, unit=count, chunks=(rows * prompt,), stop_tokens=())
    return Sampler(program, prompt, count)


def is_own(settings: Settings, step: int) -> bool:
    """Whether the rows of a step are the student's, which depends on its number and the seed alone."""
    return bool(np.random.default_rng((settings.seed, step, 0)).random() < settings.on_policy)


def own_seed(settings: Settings, number: int) -> int:
    """Returns the seed of a piece's text."""
    return int(np.random.default_rng((settings.seed, number, 1)).integers(1 << 31))


def check_sampled(student: Graph, lesson: Lesson, length: int) -> None:
    """Raises OptionError where nothing can be learned from what the student writes."""
    if any(isinstance(term, CrossEntropy) for term in lesson.objective.terms):
        raise OptionError(
            f"on_policy: {lesson.objective} learns the text itself, which is the student's own; leave out cross_entropy"
        )
    if lesson.teacher is None:
        raise OptionError("on_policy: the teacher reads what the student writes; stored logits are of another text")
    if student.vocab > lesson.teacher.vocab:
        raise OptionError(
            f"on_policy: the student may write any of {student.vocab:,} tokens, and the teacher reads "
            f"{lesson.teacher.vocab:,}"
        )
    if length < 2:
        raise OptionError("on_policy: expected rows of at least 2 tokens, of which the first half is the text's")
