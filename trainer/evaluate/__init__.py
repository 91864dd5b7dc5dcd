"""What a model's embeddings do downstream: scores with confidence intervals."""
