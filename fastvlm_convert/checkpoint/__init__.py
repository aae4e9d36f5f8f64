"""Find, validate and stream checkpoint files. Never writes to a checkpoint."""
