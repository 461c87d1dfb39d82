"""Which single weights become zero: array algorithms that know no graph, one a file."""
