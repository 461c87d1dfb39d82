"""The file formats of checkpoints: each is read into `xlathe.models.checkpoint.Checkpoint` and written from it."""
