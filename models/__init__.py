"""Models written as plain full-sequence forward passes."""
