"""Runs a model on all annotated images and collects proposals, windows and masks given boxes for the analyses.

Shape letters:
    H, W: image height and width in pixels
"""

import os
from collections.abc import Callable, Iterator
from typing import Optional

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from pycocotools.coco import COCO
from torch import nn

from ...console import progress
from ...modeling.meta_arch import SegmentProposalNetwork
from ...windows.geometry import canonical_size
from ...windows.labels import label_rule
from .image_proposals import ImageProposals, image_proposals
from .masks_given_boxes import BoxDecoder, decode_boxes
from .masks_given_clicks import ClickDecoder, decode_clicks
from .missed_objects import WindowRule


def images_of_model(
    coco: COCO,
    image_root: str,
    propose: Callable[[np.ndarray], Instances],
    decode: Optional[BoxDecoder] = None,
    click: Optional[ClickDecoder] = None,
) -> Iterator[ImageProposals]:
    """Run a model on all annotated images.

    Args:
        coco: annotations that `data.coco.check_annotations` has passed.
        image_root: path of the folder with the images.
        propose: returns the proposals of an image, (H, W, 3) uint8 BGR, as `Instances` in the frame of this image, as
            `ProposalPredictor` does.
        decode: decodes masks from the objects' true boxes. Default: None, `masks_given_boxes` stays None.
        click: decodes masks from one click on each object. Default: None, `masks_given_clicks` stays None.

    Yields:
        One `ImageProposals` with windows per annotated image.

    Raises:
        OSError: an image cannot be read.
        UserError: an image has another size than in the annotations, or see `image_proposals`.
    """
    for image_id in progress(coco.getImgIds(), desc="proposals"):
        pixels = read_image(os.path.join(image_root, coco.imgs[image_id]["file_name"]), format="BGR")
        pixels = np.ascontiguousarray(pixels)
        proposals = propose(pixels)
        masks = proposals.proposal_masks
        scores, windows = (x.detach().cpu().double().numpy() for x in (proposals.objectness_logits, masks.windows))
        image = image_proposals(coco, image_id, masks.rle(), scores, windows)
        if decode is not None:
            image = image._replace(masks_given_boxes=decode_boxes(decode, pixels, image.objects.boxes))
        if click is not None:
            image = image._replace(masks_given_clicks=decode_clicks(click, pixels, image.objects.truth.regions))
        yield image


def window_rule(cfg: CfgNode, model: nn.Module) -> WindowRule:
    """Build the rule that decides which windows of a model are near an object.

    Args:
        cfg: config of the model; `MODEL.SHARPMASK.LABELS` and `MODEL.SHARPMASK.WINDOW_SIZE` are read.
        model: a stand-alone proposal network.

    Returns:
        The rule with the limits of `MODEL.SHARPMASK.LABELS` for positive patches, in the units of the windows of the model's masks.
    """
    rule, size = label_rule(cfg), canonical_size(cfg.MODEL.SHARPMASK.WINDOW_SIZE)
    share = object_share(model, cfg.MODEL.SHARPMASK.WINDOW_SIZE)
    # The limit of the rule is in pixels of a patch that holds an object of the canonical size.
    return WindowRule(share, rule["positive_shift"] * share / size, rule["positive_octaves"])


def object_share(model: nn.Module, window_size: int) -> float:
    """Look up how large an object is in its canonical window.

    Args:
        model: a stand-alone proposal network.
        window_size: `MODEL.SHARPMASK.WINDOW_SIZE`, side of the training patch of a network on an image pyramid in pixels.

    Returns:
        Larger side of the object as a share of the side of the mask's window.
    """
    if isinstance(model, SegmentProposalNetwork):
        return model.proposal_generator.mask_share
    return canonical_size(window_size) / window_size
