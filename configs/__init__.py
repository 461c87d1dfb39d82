"""Configuration presets, found by name."""
