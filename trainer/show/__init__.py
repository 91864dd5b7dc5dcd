"""What one looks at: a run's report, pictures and maps of embeddings."""
