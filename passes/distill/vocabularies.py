"""Whether a student and its teacher mean the same tokens."""

from xlathe.errors import OptionError
from xlathe.graph import Graph


def check_vocabularies(student: Graph, teacher: Graph, shared: bool = False) -> None:
    """Raises OptionError where student and teacher do not mean the same tokens.

    shared: other numbers of logits are no error, which are padded differently; ids that both have are compared.
    """
    if student.vocab != teacher.vocab and not shared:
        raise OptionError(
            f"the student has {student.vocab:,} logits a token and the teacher {teacher.vocab:,}; where both are the "
            "same vocabulary padded differently, --shared_vocab compares what both have; a student of another "
            "vocabulary learns from texts that the teacher wrote: --loss=cross_entropy"
        )
    own, other = (None if g.tokenizer is None else g.tokenizer.get_vocab() for g in (student, teacher))
    if own is not None and other is not None and own != other:
        differing = sum(other.get(token) != number for token, number in own.items())
        raise OptionError(
            f"student and teacher have different tokenizers: {differing:,} of the student's {len(own):,} tokens are "
            f"not the teacher's ({len(other):,}); a student of another vocabulary learns from texts that the teacher "
            "wrote: --loss=cross_entropy"
        )
