"""What a recogniser is worth: per class, per site and by patient, in figures that do not flatter (decision 10)."""

from smearline.metrics.report import evaluate, goal_met, headline

__all__ = ["evaluate", "goal_met", "headline"]
