"""High-level operations, one file each: an operation exists because a kernel, a cache or a quantizer consumes it."""
