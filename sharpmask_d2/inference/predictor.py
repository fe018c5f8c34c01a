"""Predictors, which compute the proposals or the detections of images in one call.

Shape letters: H W height and width of an image in pixels, h w of the resized image, N detections.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

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
from .ranks import shard_of_rank

# The kinds of images that predictors accept, see `data.images.to_pixels`.
AnyImage = Union[np.ndarray, str, Path, Image]


class ProposalPredictor:
    """Computes segment proposals of images.

    predictor = ProposalPredictor()
    proposals = predictor(cv2.imread("photograph.jpg"))
    """

    def __init__(self, cfg: Optional[CfgNode] = None, *, dtype: str = "float32", compiled: bool = False):
        """
        Args:
            cfg: a config of a stand-alone network. MODEL.WEIGHTS is loaded; weights are random if it is empty. Default: None, the packaged
                model `model_zoo.DEFAULT`.
            dtype: "float32", or "bfloat16", which is faster on hardware that supports it and slightly less exact. Default: "float32".
            compiled: whether the trunk or backbone is compiled, see `preparation.prepare_for_inference`. Default: False.

        Raises:
            FileNotFoundError: the file of weights does not exist.
            UserError: a wrong architecture, dtype or device, or weights that lack parameters of the model; the message names them.
        """
        cfg = model_zoo.get_config(model_zoo.DEFAULT) if cfg is None else cfg
        if cfg.MODEL.META_ARCHITECTURE not in ALONE:
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: a predictor of proposals needs one of {ALONE}"
            )
        self.cfg, self.dtype = cfg, dtype
        self.model, self.resize = _build(cfg, dtype, compiled)

    def __call__(self, image: AnyImage) -> Instances:
        """Computes the proposals of an image.

        Args:
            image: (H, W, 3) uint8 in BGR order, as cv2.imread returns it and Detectron2's DefaultPredictor expects it; or a grey image, a
                path or an image of Pillow, see `data.images.to_pixels`.

        Returns:
            Instances, best first, in the frame of the image: proposal_boxes (Boxes), objectness_logits, proposal_masks (WindowMasks).

        Raises:
            ImageError: the argument is no image of these kinds, or has no pixels.
        """
        return self.of_batch([image])[0]

    @torch.no_grad()
    def of_batch(self, images: Sequence[AnyImage]) -> list[Instances]:
        """Computes the proposals of several images. Images of one size form a batch; peak memory grows linearly with its size.

        Args:
            images: see `__call__`.

        Returns:
            One `Instances` per image, in the order of the images.

        Raises:
            ImageError: an element is no image, or has no pixels.
        """
        inputs = [prepare_image(image, self.resize, self.cfg) for image in images]
        with autocast(self.model.device, self.dtype):
            proposals = [output["proposals"] for output in self.model(inputs)]
        bound_kept_memory()
        return proposals


class DetectionPredictor:
    """Computes detections of images, by a detector with a proposal generator.

    detector = DetectionPredictor()
    instances = detector(cv2.imread("photograph.jpg"))
    """

    def __init__(self, cfg: Optional[CfgNode] = None):
        """
        Args:
            cfg: a config of a detector with a proposal generator. MODEL.WEIGHTS is loaded; weights are random if it is empty. Default:
                None, the packaged detector `model_zoo.DEFAULT_DETECTOR`.

        Raises:
            FileNotFoundError: the file of weights does not exist.
            UserError: the config is not of a detector, or of one that needs precomputed proposals; a wrong device; or weights that lack
                parameters of the model.
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
        """Computes the detections of an image.

        Args:
            image: see `ProposalPredictor`.

        Returns:
            Instances, best first, in the frame of the image: pred_boxes, scores, pred_classes and, if the detector has masks, pred_masks
            (N, H, W) bool.

        Raises:
            ImageError: the argument is no image, or has no pixels.
        """
        (output,) = self.model([prepare_image(image, self.resize, self.cfg)])
        bound_kept_memory()
        return output["instances"]


def load_model(cfg: CfgNode) -> torch.nn.Module:
    """Builds the model of a config and loads its weights. They are random if MODEL.WEIGHTS is empty.

    Args:
        cfg: a config of any model of this package or of Detectron2.

    Raises:
        FileNotFoundError: the file of weights does not exist.
        UserError: the device does not exist, or the file is no checkpoint or lacks parameters of the model; the message names them.
    """
    if shard_of_rank() is not None and torch.cuda.is_available():
        # "cuda" then means the GPU of this process. With fewer GPUs than processes, several processes share one.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    check_device(cfg)
    # In this layout, convolutions are faster on CPUs and on CUDA.
    model = build_model(cfg).to(memory_format=torch.channels_last)
    if cfg.MODEL.WEIGHTS:
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def _build(cfg: CfgNode, dtype: str = "float32", compiled: bool = False) -> tuple[Any, ResizeShortestEdge]:
    """The model, prepared for inference, and the augmentation that resizes its images."""
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    return prepare_for_inference(load_model(cfg), dtype, compiled=compiled), resize


def prepare_image(image: AnyImage, resize: ResizeShortestEdge, cfg: CfgNode) -> dict[str, Any]:
    """Makes the input of a model from an image.

    Args:
        image: see `data.images.to_pixels`.
        resize: resizes the image to the size that the model was trained for.
        cfg: a config; INPUT.FORMAT is the channel order of the model.

    Returns:
        {"image": (3, h, w) uint8, "height": H, "width": W}.

    Raises:
        ImageError: the argument is no image, or has no pixels.
    """
    image = to_pixels(image)
    resized = resize.get_transform(image).apply_image(image)
    pixels = resized[:, :, ::-1] if cfg.INPUT.FORMAT == "RGB" else resized
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}
