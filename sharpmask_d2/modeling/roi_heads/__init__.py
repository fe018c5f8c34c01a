"""RoI heads: the parts of the MultiPath network, heads whose detections keep the masks of their proposals, and a mask head."""

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
from .sharpmask_head import BoxROIMasks, SharpMaskHead, resample_masks
from .skip_pooling import SkipPooler, normalize_regions

__all__ = [
    "BoxROIMasks",
    "FovealPooler",
    "FovealTowers",
    "IntegralOutputLayers",
    "MaskKeepingOutputLayers",
    "MultiPathROIHeads",
    "ProposalMaskROIHeads",
    "ProposalMaskRes5ROIHeads",
    "ProposalROIMasks",
    "SharpMaskHead",
    "SkipPooler",
    "attach_proposal_masks",
    "foveal_boxes",
    "labels_at_thresholds",
    "normalize_regions",
    "resample_masks",
    "vote_boxes",
    "without_masks",
]
