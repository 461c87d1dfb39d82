"""A small code-completion model, trained on Python's standard library, and a draft of a tenth of its cost."""

from xlathe.models.demo.files import card, load, tokenizer

__all__ = ["card", "load", "tokenizer"]
