"""Masks of given boxes and clicks for the analysis, by a model that decodes the mask of any window.

Shape letters:
    G: boxes or clicks of an image
    H, W: image height and width
"""

from collections.abc import Callable
from typing import Optional

import numpy as np

from ..modeling.meta_arch import SegmentProposalNetwork
from ..structures import WindowMasks
from .predictor import ProposalPredictor
from .prompt_predictor import SharpMaskPredictor


def box_decoder(predictor: ProposalPredictor) -> Optional[Callable[[np.ndarray, np.ndarray], WindowMasks]]:
    """Returns a function that makes masks of given boxes, each in the canonical window of its box.

    Args:
        predictor: of any model.

    Returns:
        A function of an image, (H, W, 3) uint8 BGR, and of boxes, (G, 4) XYXY in pixels of the image; it returns G masks in the frame of
        the image. None for a model that makes masks only of the windows that it scores.
    """
    if not isinstance(predictor.model, SegmentProposalNetwork):
        return None
    prompts = SharpMaskPredictor(predictor, crop_to_boxes=False)

    def decode(image: np.ndarray, boxes: np.ndarray) -> WindowMasks:
        prompts.set_image(image)
        return prompts.predict_masks(boxes=boxes).masks

    return decode


def click_decoder(predictor: ProposalPredictor) -> Optional[Callable[[np.ndarray, np.ndarray], WindowMasks]]:
    """Returns a function that makes masks of single clicks.

    Args:
        predictor: of any model.

    Returns:
        A function of an image, (H, W, 3) uint8 BGR, and of points, (G, 2) XY in pixels of the image; it returns three masks for each point,
        by descending score, in the frame of the image. None for a model that makes masks only of the windows that it scores.
    """
    if not isinstance(predictor.model, SegmentProposalNetwork):
        return None
    prompts = SharpMaskPredictor(predictor)

    def decode(image: np.ndarray, points: np.ndarray) -> WindowMasks:
        prompts.set_image(image)
        return prompts.predict_masks(points=points[:, None]).masks

    return decode
