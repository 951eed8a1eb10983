"""Training: from a plan to a run directory."""

from memforge.training.loop import train

__all__ = ["train"]
