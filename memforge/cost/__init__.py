"""The ledger: what a plan costs, without torch."""

from memforge.cost.ledger import AXES, CONVENTIONS, EXCLUDED, CostReport, estimate, per_token

__all__ = ["AXES", "CONVENTIONS", "EXCLUDED", "CostReport", "estimate", "per_token"]
