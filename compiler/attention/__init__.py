"""Attention in a graph, recognized by its axis labels."""
