"""Distillation: a smaller graph learns what a larger one predicts."""
