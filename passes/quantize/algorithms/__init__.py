"""How the numbers of a quantized weight are chosen: array algorithms that know no graph, one a file."""
