"""What a student is trained for: a weighted sum of terms, `forward_kl{temperature=2.0},features{weight=0.5}`."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, final

import jax

from xlathe.errors import OptionError
from xlathe.pass_text import parse_passes, print_pass
from xlathe.passes.distill import losses


class Seen(NamedTuple):
    """What a student makes of tokens [b, t]: logits [b, t, vocab], and values [b, t, width] of its residual stream."""

    logits: jax.Array
    features: tuple[jax.Array, ...] = ()


class Taught(NamedTuple):
    """What a teacher makes of the same tokens, as far as it is known; features are as wide as the student's."""

    logits: jax.Array | None = None
    top: losses.TopK | None = None
    features: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class Term(abc.ABC):
    """A loss with the factor that it is multiplied with. Raises OptionError for options out of range."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("weight", "temperature") and not (isinstance(value, int | float) and 0 < value < 1e9):
                raise OptionError(f"{self}: {field.name} must be a positive number, got {value!r}")

    @abc.abstractmethod
    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        """Returns the loss of each token, float32 [b, t]; following: the tokens that come next, int32 [b, t]."""

    def __str__(self) -> str:
        return print_pass(self)


@final
@dataclasses.dataclass(frozen=True)
class ForwardKL(Term):
    """KL(teacher || student): the student covers everything that the teacher finds likely."""

    temperature: float = 1.0

    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        return losses.forward_kl(*_both(seen, taught), self.temperature)


@final
@dataclasses.dataclass(frozen=True)
class ReverseKL(Term):
    """KL(student || teacher): the student keeps away from what the teacher finds unlikely."""

    temperature: float = 1.0

    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        return losses.reverse_kl(*_both(seen, taught), self.temperature)


@final
@dataclasses.dataclass(frozen=True)
class JSD(Term):
    """The generalized Jensen-Shannon divergence; beta 0 is forward KL, 1 reverse KL."""

    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.beta, int | float) and 0 <= self.beta <= 1):
            raise OptionError(f"{self}: beta must be 0 (forward KL) to 1 (reverse KL)")

    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        return losses.jsd(*_both(seen, taught), self.beta, self.temperature)


@final
@dataclasses.dataclass(frozen=True)
class TopK(Term):
    """KL(teacher || student) over the teacher's k likeliest tokens and one bucket of all others."""

    k: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, int) or self.k < 1:
            raise OptionError(f"{self}: k must be a positive number of tokens, got {self.k!r}")

    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        if taught.top is not None:
            return losses.top_k_kl(seen.logits, taught.top, self.temperature)
        own, others = _both(seen, taught)
        top = losses.top_k(others, min(self.k, others.shape[-1]), self.temperature)
        return losses.top_k_kl(own, top, self.temperature)


@final
@dataclasses.dataclass(frozen=True)
class CrossEntropy(Term):
    """-log p of the text itself, which needs no teacher."""

    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        return losses.cross_entropy(seen.logits, following)


@final
@dataclasses.dataclass(frozen=True)
class Features(Term):
    """The residual stream after each layer beside the teacher's, the mean over layers.

    measure: `squared`, over the teacher's mean square, or `cosine`. Of a teacher with a wider stream only the
    features that pruning kept are compared.
    """

    measure: Literal["squared", "cosine"] = "squared"

    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        apart = losses.squared_error if self.measure == "squared" else losses.cosine_distance
        each = [apart(own, other) for own, other in zip(seen.features, taught.features, strict=True)]
        return sum(each[1:], each[0]) / len(each)


TERMS: Final[Mapping[str, type[Term]]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "top_k": TopK,
    "cross_entropy": CrossEntropy,
    "features": Features,
}


@final
@dataclasses.dataclass(frozen=True)
class Objective:
    """Terms that are added up, each times its weight."""

    terms: tuple[Term, ...]

    @staticmethod
    def parse(text: str) -> "Objective":
        """Reads the text form; raises OptionError for unknown terms and options, and where there is none."""
        terms = tuple(parse_passes(text, TERMS))
        if not terms:
            raise OptionError(f"no loss in {text!r}; expected some of {', '.join(TERMS)}")
        return Objective(terms)

    def __str__(self) -> str:
        return ",".join(map(str, self.terms))

    @property
    def needs_logits(self) -> bool:
        """Whether a teacher's logits are asked for."""
        return any(isinstance(term, ForwardKL | ReverseKL | JSD | TopK) for term in self.terms)

    @property
    def needs_teacher(self) -> bool:
        return self.needs_logits or self.needs_features

    @property
    def needs_features(self) -> bool:
        return any(isinstance(term, Features) for term in self.terms)

    def values(self, seen: Seen, taught: Taught, following: jax.Array) -> jax.Array:
        """Returns the loss of each token, float32 [b, t]."""
        each: Sequence[jax.Array] = [term.weight * term.values(seen, taught, following) for term in self.terms]
        return sum(each[1:], each[0])


def _both(seen: Seen, taught: Taught) -> tuple[jax.Array, jax.Array]:
    """Returns the logits of student and teacher of the ids that both have."""
    assert taught.logits is not None
    shared = min(seen.logits.shape[-1], taught.logits.shape[-1])
    return seen.logits[..., :shared], taught.logits[..., :shared]
