"""From an image to its proposals, or to its detections, in one call.

Shape letters: H W image.
"""

from pathlib import Path
from typing import Optional, Union

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL.Image import Image

from .. import model_zoo
from ..checkpoint import StrictCheckpointer
from ..config import check_device
from ..data.images import to_pixels
from ..errors import UserError
from ..modeling.meta_arch import ALONE
from .caching import bound_kept_memory
from .preparation import autocast, prepare_for_inference

# What predictors take; see `images.to_pixels`.
AnyImage = Union[np.ndarray, str, Path, Image]


class ProposalPredictor:
    """Segment proposals of single images.

    predictor = ProposalPredictor()
    proposals = predictor(cv2.imread("photograph.jpg"))
    """

    def __init__(self, cfg: Optional[CfgNode] = None, *, dtype: str = "float32", compiled: bool = False):
        """
        Args:
            cfg: a config of the stand-alone network; MODEL.WEIGHTS is loaded, or weights stay random where it is empty. None takes the
                packaged model `model_zoo.DEFAULT`.
            dtype: "float32", or "bfloat16" where the hardware has it: faster, and a little less exact.
            compiled: see `modeling.inference.prepare_for_inference`.

        Raises:
            ValueError: another architecture or dtype, or weights that lack parameters of the model; the message names them.
        """
        cfg = model_zoo.get_config(model_zoo.DEFAULT) if cfg is None else cfg
        if cfg.MODEL.META_ARCHITECTURE not in ALONE:
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: a predictor of proposals needs one of {ALONE}"
            )
        self.cfg, self.dtype = cfg, dtype
        self.model, self.resize = _build(cfg, dtype, compiled)

    def __call__(self, image: AnyImage) -> Instances:
        """
        Args:
            image: (H, W, 3) uint8 in BGR order, as cv2.imread returns it and Detectron2's DefaultPredictor takes it; or a grey image, a
                path or an image of Pillow, see `images.to_pixels`.

        Returns:
            Instances, best first, in the frame of the image: proposal_boxes (Boxes), objectness_logits, proposal_masks (WindowMasks).

        Raises:
            ImageError: not such an image, or one without pixels.
        """
        return self.of_batch([image])[0]

    @torch.no_grad()
    def of_batch(self, images: list) -> list:
        """Proposals of several images: those of one size go through the trunk or the backbone together, in memory that grows with them.

        Args:
            images: see `__call__`.

        Returns:
            one Instances an image, in their order.

        Raises:
            ImageError: one is not such an image, or has no pixels.
        """
        inputs = [prepare_image(image, self.resize, self.cfg) for image in images]
        with autocast(self.model.device, self.dtype):
            proposals = [output["proposals"] for output in self.model(inputs)]
        bound_kept_memory()
        return proposals


class DetectionPredictor:
    """Detections of single images, by a detector that makes its own proposals.

    detector = DetectionPredictor()
    instances = detector(cv2.imread("photograph.jpg"))
    """

    def __init__(self, cfg: Optional[CfgNode] = None):
        """
        Args:
            cfg: a config of a detector with online proposals; MODEL.WEIGHTS is loaded, or weights stay random where it is empty. None
                takes the packaged detector `model_zoo.DEFAULT_DETECTOR`.

        Raises:
            ValueError: no detector, a detector that waits for precomputed proposals, or weights that lack parameters.
        """
        cfg = model_zoo.get_config(model_zoo.DEFAULT_DETECTOR) if cfg is None else cfg
        if cfg.MODEL.META_ARCHITECTURE in ALONE:
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, which only makes proposals: a detector is needed"
            )
        if cfg.MODEL.LOAD_PROPOSALS:
            raise UserError(
                "MODEL.LOAD_PROPOSALS: there are no precomputed proposals for new images; set it to False, "
                "MODEL.PROPOSAL_GENERATOR.NAME to SharpMask, and MODEL.SHARPMASK.GENERATOR.WEIGHTS"
            )
        self.cfg = cfg
        self.model, self.resize = _build(cfg)

    @torch.no_grad()
    def __call__(self, image: AnyImage) -> Instances:
        """
        Args:
            image: see `ProposalPredictor`.

        Returns:
            Instances, best first, in the frame of the image: pred_boxes, scores, pred_classes and, if the detector has them, pred_masks
            (N, H, W) bool.

        Raises:
            ImageError: not such an image, or one without pixels.
        """
        (output,) = self.model([prepare_image(image, self.resize, self.cfg)])
        bound_kept_memory()
        return output["instances"]


def load_model(cfg: CfgNode) -> torch.nn.Module:
    """The model of a config with its weights, random where MODEL.WEIGHTS is empty.

    Raises:
        FileNotFoundError: no such file of weights.
        UserError: a device that is not there, no checkpoint, or one that lacks parameters of the model; the message names them.
    """
    check_device(cfg)
    # Convolutions run faster in this layout on CPUs and on CUDA.
    model = build_model(cfg).to(memory_format=torch.channels_last)
    if cfg.MODEL.WEIGHTS:
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def _build(cfg: CfgNode, dtype: str = "float32", compiled: bool = False) -> tuple:
    """The model ready to run, and what resizes its images."""
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    return prepare_for_inference(load_model(cfg), dtype, compiled=compiled), resize


def prepare_image(image: AnyImage, resize: ResizeShortestEdge, cfg: CfgNode) -> dict:
    """What a model takes for an image.

    Args:
        image: see `images.to_pixels`.
        resize: to the size that the model is meant for.
        cfg: for INPUT.FORMAT, the order of the model's channels.

    Returns:
        {"image": (3, h, w) uint8, "height": H, "width": W}.

    Raises:
        ImageError: not such an image, or one without pixels.
    """
    image = to_pixels(image)
    resized = resize.get_transform(image).apply_image(image)
    pixels = resized[:, :, ::-1] if cfg.INPUT.FORMAT == "RGB" else resized
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}
