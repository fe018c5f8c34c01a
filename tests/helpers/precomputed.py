"""Drawn proposals of images, as results, and a small detector that reads precomputed proposals."""

import cv2
import numpy as np
from drawing import compressed_rle
from pycocotools import mask as mask_util

# Height and width of the images in pixels.
SIZE = (120, 160)


def draw_proposals(masks: list, rng, *, count: int = 12) -> list:
    """Results for an image: its objects and discs somewhere, in no order; two have the same score."""
    masks = list(masks)
    while len(masks) < count:
        disc = np.zeros(SIZE, np.uint8)
        centre = [int(rng.integers(20, side - 20)) for side in SIZE[::-1]]
        masks.append(cv2.ellipse(disc, centre, rng.integers(5, 30, 2).tolist(), 30, 0, 360, 1, -1) > 0)
    scores = rng.permutation(np.linspace(0.1, 0.9, len(masks)))
    scores[1] = scores[0]
    rles = [compressed_rle(mask) for mask in masks]
    return [
        {"bbox": mask_util.toBbox(rle).tolist(), "score": float(score), "segmentation": rle}
        for rle, score in zip(rles, scores)
    ]


def to_detector(cfg, roi_heads: str = "StandardROIHeads"):
    """A small Fast R-CNN from the tiny config, in place."""
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 50 if "Res5" in roi_heads else 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if "Res5" not in roi_heads else 32
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.ROI_HEADS.NAME = roi_heads
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.SOLVER.BASE_LR = 0.0001
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.MAX_ITER = 2
    return cfg
