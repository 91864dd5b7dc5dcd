"""How a training runs: its configuration, its ranks, its checkpoints, and what watches it."""
