"""Merging models: pure functions on the tensors of one name, a file a family of methods."""
