"""The passes: one pass, one file."""
