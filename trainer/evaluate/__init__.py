"""What a model's embeddings do downstream: `evaluate(checkpoint, dataset)` gives scores with confidence intervals."""

from trainer.evaluate.scores import Score
from trainer.evaluate.scoring import EvaluateOptions, evaluate, evaluate_model

__all__ = ["EvaluateOptions", "Score", "evaluate", "evaluate_model"]
