"""From an image to its proposals in one call.

Shape letters: H W image.
"""

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from .checkpoint import StrictCheckpointer
from .engine import ARCHITECTURE, Trainer
from .modeling.layers import fold_batch_norm


class ProposalPredictor:
    """Segment proposals of single images.

    predictor = ProposalPredictor(model_zoo.get("sharpmask_lite0"))
    proposals = predictor(cv2.imread("photograph.jpg"))
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a config of the stand-alone network; MODEL.WEIGHTS is loaded, or weights stay random where it is empty.

        Raises:
            ValueError: another architecture, or weights that lack parameters of the model; the message names them.
        """
        if cfg.MODEL.META_ARCHITECTURE != ARCHITECTURE:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: a predictor of proposals needs {ARCHITECTURE}"
            )
        self.cfg = cfg
        model = Trainer.build_model(cfg)
        if cfg.MODEL.WEIGHTS:
            StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        self.model = fold_batch_norm(model.eval())

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """
        Args:
            image: (H, W, 3) uint8 in BGR order, as cv2.imread returns it and Detectron2's DefaultPredictor takes it.

        Returns:
            Instances, best first, in the frame of the image: proposal_boxes (Boxes), objectness_logits, proposal_masks (WindowMasks).

        Raises:
            ValueError: not a colour image, or one without pixels.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"expected a colour image of shape (height, width, 3), got {image.shape}")
        pixels = image[:, :, ::-1] if self.cfg.INPUT.FORMAT == "RGB" else image
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return self.model([{"image": tensor}])[0]["proposals"]
