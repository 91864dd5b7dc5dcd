"""From batches of tiles to embeddings."""
