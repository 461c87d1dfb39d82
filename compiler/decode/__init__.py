"""Decoding: from a compiled step's logits to tokens and text."""
