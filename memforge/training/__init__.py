"""Training: data, steps, checkpoints, evaluation."""

from memforge.training.loop import Budget, Reporter, train

__all__ = ["Budget", "Reporter", "train"]
