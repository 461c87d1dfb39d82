"""xlathe: shapes a JAX model with passes and compiles it ahead of time into a serving binary."""
