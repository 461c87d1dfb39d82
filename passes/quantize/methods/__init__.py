"""Ways to choose the numbers of a quantized weight: array algorithms that know no graph, one a file."""
