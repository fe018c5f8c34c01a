"""Evaluation of proposals: recall and AR, evaluators for Detectron2, and the analysis of what proposals miss."""

from .detector_proposals import GeneratedProposalEvaluator, WithGeneratedProposals, evaluate_proposal_file
from .patch_evaluation import PatchEvaluator
from .proposal_evaluation import ProposalEvaluator

__all__ = [
    "GeneratedProposalEvaluator",
    "PatchEvaluator",
    "ProposalEvaluator",
    "WithGeneratedProposals",
    "evaluate_proposal_file",
]
