"""What a model's embeddings do downstream: `evaluate(checkpoint, dataset)` gives scores with confidence intervals."""

from trainer.evaluate.run import EvaluateOptions, evaluate, evaluate_model
from trainer.evaluate.scores import Score

__all__ = ["EvaluateOptions", "Score", "evaluate", "evaluate_model"]
