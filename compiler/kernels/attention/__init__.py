"""attention: kernels by back end."""
