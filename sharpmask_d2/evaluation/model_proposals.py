"""Proposals of a model as the analyses read them: with their windows, and with the masks that the model makes of given boxes.

Shape letters: H W image.
"""

import os
from collections.abc import Callable, Iterator
from typing import Optional

import numpy as np
from detectron2.data.detection_utils import read_image
from pycocotools.coco import COCO
from torch import nn
from tqdm import tqdm

from ..modeling.meta_arch import SegmentProposalNetwork
from ..windows.geometry import canonical_size
from ..windows.labels import label_rule
from .given_boxes import BoxDecoder, decode_boxes
from .missed_objects import WindowRule
from .proposed_image import ProposedImage, proposed_image


def images_of_model(
    coco: COCO, image_root: str, propose: Callable, decode: Optional[BoxDecoder] = None
) -> Iterator[ProposedImage]:
    """All annotated images with the proposals that a model makes of them, and their windows.

    Args:
        coco: annotations.
        image_root: folder of the images.
        propose: makes Instances in the frame of an image (H, W, 3), uint8, BGR, as `ProposalPredictor` does.
        decode: makes masks of given boxes, None asks for no such masks.

    Raises:
        OSError: an image cannot be read.
        ValueError: see `proposed_image`; for an image of another size than in the annotations, too.
    """
    for image_id in tqdm(coco.getImgIds(), unit="image", desc="proposals"):
        pixels = read_image(os.path.join(image_root, coco.imgs[image_id]["file_name"]), format="BGR")
        pixels = np.ascontiguousarray(pixels)
        proposals = propose(pixels)
        masks = proposals.proposal_masks
        scores, windows = (x.detach().cpu().double().numpy() for x in (proposals.objectness_logits, masks.windows))
        image = proposed_image(coco, image_id, masks.rle(), scores, windows)
        if decode is not None:
            image = image._replace(given_boxes=decode_boxes(decode, pixels, image.objects.boxes))
        yield image


def window_rule(cfg, model: nn.Module) -> WindowRule:
    """Which windows of a model are near to an object: those within the limits of MODEL.SHARPMASK.LABELS for positive patches.

    Args:
        cfg: of the model.
        model: a stand-alone network.
    """
    rule, size = label_rule(cfg), canonical_size(cfg.MODEL.SHARPMASK.WINDOW_SIZE)
    share = object_share(model, cfg.MODEL.SHARPMASK.WINDOW_SIZE)
    # From pixels of a patch that holds an object of canonical size.
    return WindowRule(share, rule["positive_shift"] * share / size, rule["positive_octaves"])


def object_share(model: nn.Module, window_size: int) -> float:
    """Larger side of an object that fits the window of a mask, as a share of the window's side.

    Args:
        model: a stand-alone network.
        window_size: MODEL.SHARPMASK.WINDOW_SIZE, which a network on an image pyramid has.
    """
    if isinstance(model, SegmentProposalNetwork):
        return model.proposal_generator.mask_share
    return canonical_size(window_size) / window_size
