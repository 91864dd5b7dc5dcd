"""From slides to files of embeddings."""
