"""Masks of given boxes, by a model that decodes the mask of any window.

Shape letters:
    G: boxes
    H, W: image height and width
"""

from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import torch

from ..modeling.meta_arch import SegmentProposalNetwork
from ..modeling.segment_generator import Windows
from ..structures import WindowMasks
from .predictor import ProposalPredictor, prepare_image
from .preparation import autocast


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
    generator: Any = predictor.model.proposal_generator

    @torch.no_grad()
    def decode(image: np.ndarray, boxes: np.ndarray) -> WindowMasks:
        inputs = prepare_image(image, predictor.resize, predictor.cfg)
        (old_height, old_width), (height, width) = image.shape[:2], inputs["image"].shape[1:]
        scaled = torch.from_numpy(boxes * ([width / old_width, height / old_height] * 2)).float()
        windows = generator.canonical_windows(scaled.to(predictor.model.device))
        with autocast(predictor.model.device, predictor.dtype):
            logits = generator.decode(predictor.model.encode([inputs]), Windows(windows))
        masks = WindowMasks(logits, windows, (height, width), threshold=generator.mask_threshold)
        return masks.scale(old_width / width, old_height / height, (old_height, old_width))

    return decode
