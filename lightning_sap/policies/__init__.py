"""What an algorithm is: how many weights go and come back, and by which score."""

from lightning_sap.policies.amounts import FixedFraction, SparsityInformed
from lightning_sap.policies.base import Amounts, Closing, Importance, Policy, Standing, Turn, check_policy
from lightning_sap.policies.gathered import FisherRatio, Gathered, Taylor, Wanda
from lightning_sap.policies.importance import Magnitude, check_importance
from lightning_sap.policies.regrowth import GrowAndPrune

__all__ = [
    "Amounts",
    "Closing",
    "FisherRatio",
    "FixedFraction",
    "Gathered",
    "GrowAndPrune",
    "Importance",
    "Magnitude",
    "Policy",
    "SparsityInformed",
    "Standing",
    "Taylor",
    "Turn",
    "Wanda",
    "check_importance",
    "check_policy",
]
