"""Recipes of `xlathe shrink`, found by name."""
