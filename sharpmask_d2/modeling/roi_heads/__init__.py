"""RoI heads: the parts of the MultiPath network, and heads whose detections keep the masks of their proposals."""

from .box_voting import vote_boxes
from .foveal import FovealPooler, FovealTowers, foveal_boxes
from .integral_loss import IntegralOutputLayers, labels_at_thresholds
from .multipath import MultiPathROIHeads
from .proposal_masks import (
    MaskKeepingOutputLayers,
    ProposalMaskRes5ROIHeads,
    ProposalMaskROIHeads,
    ProposalROIMasks,
    attach_proposal_masks,
    without_masks,
)
from .skip_pooling import SkipPooler, normalize_regions

__all__ = [
    "FovealPooler",
    "FovealTowers",
    "IntegralOutputLayers",
    "MaskKeepingOutputLayers",
    "MultiPathROIHeads",
    "ProposalMaskROIHeads",
    "ProposalMaskRes5ROIHeads",
    "ProposalROIMasks",
    "SkipPooler",
    "attach_proposal_masks",
    "foveal_boxes",
    "labels_at_thresholds",
    "normalize_regions",
    "vote_boxes",
    "without_masks",
]
