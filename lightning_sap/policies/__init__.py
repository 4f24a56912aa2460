"""What an algorithm is: how many weights go, and by which score."""

from lightning_sap.policies.amounts import FixedFraction, SparsityInformed
from lightning_sap.policies.base import Policy, check_policy

__all__ = ["FixedFraction", "Policy", "SparsityInformed", "check_policy"]
