"""The files that weights come in: each is read into, and written from, a `Checkpoint`."""
