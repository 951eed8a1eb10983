"""The ledger: what a plan costs, without torch."""

from memforge.cost.ledger import AXES, CONVENTIONS, EXCLUDED, CostReport, as_number, estimate

__all__ = ["AXES", "CONVENTIONS", "EXCLUDED", "CostReport", "as_number", "estimate"]
