"""Pictures to look at before anything is trained: slides with their tissue, tiles of a batch."""
