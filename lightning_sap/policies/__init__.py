"""What an algorithm is: how many weights go and come back, and by which score."""

from lightning_sap.policies.amounts import FixedFraction, SparsityInformed
from lightning_sap.policies.base import Amounts, Importance, Policy, Standing, check_policy
from lightning_sap.policies.gathered import FisherRatio, Gathered, Taylor, Wanda
from lightning_sap.policies.importance import Magnitude, check_importance

__all__ = [
    "Amounts",
    "FisherRatio",
    "FixedFraction",
    "Gathered",
    "Importance",
    "Magnitude",
    "Policy",
    "SparsityInformed",
    "Standing",
    "Taylor",
    "Wanda",
    "check_importance",
    "check_policy",
]
