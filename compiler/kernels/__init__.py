"""Hand-written kernels, operation first and back end second. README.md in this folder says why."""
