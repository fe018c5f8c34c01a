from .patch_evaluation import PatchEvaluator
from .proposal_evaluation import ProposalEvaluator

__all__ = ["PatchEvaluator", "ProposalEvaluator"]
