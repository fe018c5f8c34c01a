"""Masks of points and boxes in an image that is encoded once.

Shape letters: B prompts, P points of a prompt, C masks of a prompt, M mask side, H W image.
"""

from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from detectron2.config import CfgNode
from numpy.typing import ArrayLike
from torch import Tensor

from ..data.images import to_pixels
from ..errors import UserError
from ..modeling.meta_arch import SegmentProposalNetwork
from ..modeling.segment_generator import Windows
from ..structures import WindowMasks
from ..structures.expected_iou import expected_iou
from ..windows.geometry import square_windows
from .point_windows import (
    BACKGROUND,
    FOREGROUND,
    NO_POINT,
    agreement,
    box_iou,
    candidate_windows,
    choose_distinct,
    grid_boxes,
    logits_at_points,
)
from .predictor import AnyImage, ProposalPredictor, prepare_image
from .preparation import autocast

# Number of masks of a prompt of points, if several are asked for.
_MASKS = 3
# IoU of boxes above which two candidates of a point count as the same object.
_SAME = 0.7
# Sizes of the windows among which points choose when a box is given as well, in sides of the canonical window.
_BOX_SCALES = (1.0, 0.71, 0.84, 1.19, 1.41)
# Maximum number of prompts whose masks are decoded at a time: points have many candidates each.
_POINTS_AT_ONCE, _BOXES_AT_ONCE = 64, 1024


class PromptMasks(NamedTuple):
    """The masks of B prompts."""

    # B * C masks in the frame of the image, prompt by prompt, those of a prompt by descending score.
    masks: WindowMasks
    # (B, C) float32 in 0..1: an estimate of the IoU of each mask with its object.
    scores: Tensor


class _Encoded(NamedTuple):
    """What is kept of the image that was set."""

    features: Any
    size: tuple[int, int]  # (H, W) of the original image
    resized: tuple[int, int]  # (H, W) of the image that the features belong to
    windows: Tensor  # (T, 4) XYXY windows of the grid whose masks may be decoded, in the frame of the resized image
    group_sizes: list[int]  # number of windows of each size


class SharpMaskPredictor:
    """Masks of points and boxes, in the manner of Segment Anything's `SamPredictor`.

    predictor = SharpMaskPredictor()
    predictor.set_image(cv2.imread("photograph.jpg"))
    masks, scores, logits = predictor.predict(boxes=[40, 30, 200, 260])
    masks, scores, logits = predictor.predict(points=[[120, 90]])

    A box gives the mask of its canonical window. A point gives masks of windows of several sizes around it: of a part, of an object, of a
    group. Several points choose among these masks. The model has not been trained on points.

    An instance holds one image: `set_image` replaces it. Threads may share the model but not the instance: give each thread its own
    `SharpMaskPredictor(proposal_predictor)`.
    """

    def __init__(
        self,
        cfg: Union[CfgNode, ProposalPredictor, None] = None,
        *,
        dtype: str = "float32",
        crop_to_boxes: bool = True,
    ):
        """
        Args:
            cfg: a config of a stand-alone network on a feature pyramid; or a `ProposalPredictor`, whose model is shared. None takes the
                packaged model `model_zoo.DEFAULT`.
            dtype: see `ProposalPredictor`; read only if `cfg` is no predictor. Default: "float32".
            crop_to_boxes: remove the pixels of a mask that lie outside of its box. This is better for boxes that hold the whole object, and
                worse for boxes that are too small. Default: True.

        Raises:
            UserError: the model is on an image pyramid, whose masks are those of the windows that it scores; or see `ProposalPredictor`.
        """
        predictor = cfg if isinstance(cfg, ProposalPredictor) else ProposalPredictor(cfg, dtype=dtype)
        if not isinstance(predictor.model, SegmentProposalNetwork):
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {predictor.cfg.MODEL.META_ARCHITECTURE}: on an image pyramid only windows of the grid have "
                "masks; prompts need a model on a feature pyramid, such as sharpmask_bifpn_lite0"
            )
        self._predictor = predictor
        self._generator: Any = predictor.model.proposal_generator
        self.crop_to_boxes = crop_to_boxes
        self._image: Optional[_Encoded] = None

    @torch.no_grad()
    def set_image(self, image: AnyImage, image_format: str = "BGR") -> None:
        """Encodes an image, once for all of its prompts.

        Args:
            image: see `ProposalPredictor`.
            image_format: order of the channels of an array, "BGR" (default, as cv2.imread returns it) or "RGB" (the default of Segment
                Anything).

        Raises:
            UserError: another order of channels; or see `ProposalPredictor`.
        """
        if image_format not in ("BGR", "RGB"):
            raise UserError(f'image_format is {image_format!r}: choose "BGR" or "RGB"')
        self.reset_image()
        pixels = to_pixels(image)
        if image_format == "RGB" and isinstance(image, np.ndarray):
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        inputs = prepare_image(pixels, self._predictor.resize, self._predictor.cfg)
        with autocast(self._predictor.model.device, self._predictor.dtype):
            features = self._predictor.model.encode([inputs])
        geometry = self._generator.geometry
        numbers = torch.arange(features.scores.shape[1], device=features.scores.device)
        windows = square_windows(
            geometry.windows(geometry.cells(numbers, features.sizes)), 1 / self._generator.mask_window
        )
        groups = [rows * columns for rows, columns in features.sizes for _ in geometry.window_cells]
        self._image = _Encoded(features, pixels.shape[:2], tuple(inputs["image"].shape[1:]), windows, groups)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the image that was set, in pixels. A UserError says that none is set."""
        return self._encoded().size

    def reset_image(self) -> None:
        """Forgets the image."""
        self._image = None

    def predict(
        self,
        points: Optional[ArrayLike] = None,
        point_labels: Optional[ArrayLike] = None,
        boxes: Optional[ArrayLike] = None,
        *,
        multimask_output: bool = True,
        return_logits: bool = False,
        point_coords: Optional[ArrayLike] = None,
        box: Optional[ArrayLike] = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of prompts in the image that was set, as numpy arrays.

        The arrays of 1,000 prompts in an image of 480 x 640 pixels take 300 MB; `predict_masks` returns masks that take less.

        Args:
            points: (P, 2) XY of one prompt, or (B, P, 2) of B prompts, in pixels of the image.
            point_labels: (P,) or (B, P): 1 for a point on the object, 0 for a point on the background, -1 for no point, which fills up the
                rows of a batch. Default: all are 1.
            boxes: (4,) XYXY of one prompt, or (B, 4) of B prompts, in pixels of the image. They may lie partly outside of it.
            multimask_output: return three masks for each prompt of points alone, such as a part, an object and a group; False returns the
                one of highest score. A prompt with a box has one mask. Default: True.
            return_logits: return logits instead of bitmaps for `masks`. Default: False.
            point_coords, box: the names that Segment Anything has for `points` and `boxes`.

        Returns:
            masks: (C, H, W) bool for one prompt, (B, C, H, W) for a batch, by descending score; or float32 logits, minus infinity outside
                of the windows of the masks.
            scores: (C,) or (B, C) float32 in 0..1, an estimate of the IoU of each mask with its object.
            logits: (C, M, M) or (B, C, M, M) float32 of low resolution. Each grid covers the window of its mask, or its box if masks are
                cropped to boxes; not the whole image as in Segment Anything.

        Raises:
            UserError: no image is set, or a prompt is not valid; the message says which.
        """
        points = _either(points, point_coords, "points", "point_coords")
        boxes = _either(boxes, box, "boxes", "box")
        found = self.predict_masks(points, point_labels, boxes, multimask_output=multimask_output)
        batched = np.ndim(boxes) == 2 if boxes is not None else np.ndim(points) == 3
        shape = found.scores.shape
        masks, scores, logits = found.masks, found.scores.cpu().numpy(), found.masks.logits.float().cpu().numpy()
        pixels = masks.paste_logits().cpu().numpy() if return_logits else masks.to_numpy()
        outputs = (pixels.reshape(*shape, *masks.image_size), scores, logits.reshape(*shape, *logits.shape[1:]))
        return outputs if batched else tuple(output[0] for output in outputs)

    @torch.no_grad()
    def predict_masks(
        self,
        points: Optional[ArrayLike] = None,
        point_labels: Optional[ArrayLike] = None,
        boxes: Optional[ArrayLike] = None,
        *,
        multimask_output: bool = True,
    ) -> PromptMasks:
        """Masks of prompts in the image that was set, without bitmaps.

        Args:
            points, point_labels, boxes, multimask_output: see `predict`. One prompt counts as a batch of one.

        Returns:
            The masks in the frame of the image and their scores. A mask may be empty.

        Raises:
            UserError: see `predict`.
        """
        size = self._encoded().size
        if points is None and point_labels is not None:
            raise UserError("point_labels are given without points")
        if points is None and boxes is None:
            raise UserError("the prompt is empty: give points or boxes")
        device = self._predictor.model.device
        given_boxes = None if boxes is None else torch.from_numpy(_read_boxes(boxes)).to(device)
        xy = marks = None
        if points is not None:
            xy, marks = (torch.from_numpy(x).to(device) for x in _read_points(points, point_labels, size))
            if given_boxes is not None and len(xy) != len(given_boxes):
                raise UserError(f"there are points of {len(xy)} prompts but {len(given_boxes)} boxes")
            if given_boxes is None and not (marks == FOREGROUND).any(1).all():
                raise UserError("a prompt has no point with the label 1: give a point on the object, or a box")
        count = _MASKS if given_boxes is None and multimask_output else 1
        step = _POINTS_AT_ONCE if given_boxes is None else _BOXES_AT_ONCE
        starts = range(0, max(len(_first(xy, given_boxes)), 1), step)
        parts = [
            self._decode(*(None if x is None else x[i : i + step] for x in (xy, marks, given_boxes)), count=count)
            for i in starts
        ]
        return PromptMasks(WindowMasks.cat([part.masks for part in parts]), torch.cat([part.scores for part in parts]))

    @torch.no_grad()
    def predict_grid(self, *, min_score: float = 0.0) -> PromptMasks:
        """Masks of the whole image without a prompt: those of the windows of highest score, refined.

        Args:
            min_score: lowest score of a mask that is returned. Default: 0.

        Returns:
            The masks in the frame of the image, at most `MODEL.SHARPMASK.FPN.NUM_REFINED`, and their scores (N, 1), in no order. A mask may
            be empty.

        Raises:
            UserError: no image is set.
        """
        image = self._encoded()
        selected = self._generator.select(image.features)[0]
        prior = selected.scores.sigmoid()
        # The quality, a geometric mean, is at most the square root of the probability.
        chosen = (prior.sqrt() >= min_score).nonzero()[: self._generator.num_refined, 0]
        windows, prior = selected.boxes[chosen, None], prior[chosen, None]
        quality, _, masks = self._rate(windows, prior, None, None, None, refined=True)
        keep = (quality[:, 0] >= min_score).nonzero()[:, 0]
        (height, width), (new_height, new_width) = image.size, image.resized
        return PromptMasks(masks[keep].scale(width / new_width, height / new_height, image.size), quality[keep])

    def _encoded(self) -> _Encoded:
        if self._image is None:
            raise UserError("no image is set: call set_image before a prompt")
        return self._image

    def _decode(
        self, points: Optional[Tensor], labels: Optional[Tensor], boxes: Optional[Tensor], *, count: int
    ) -> PromptMasks:
        """The masks of some prompts; points and boxes are in pixels of the original image."""
        image = self._encoded()
        (height, width), (new_height, new_width) = image.size, image.resized
        factors = torch.tensor([new_width / width, new_height / height], device=image.windows.device)
        points = None if points is None else (points * factors).float()
        boxes = None if boxes is None else (boxes * factors.repeat(2)).float()
        windows, prior = self._candidates(points, labels, boxes)
        count = min(count, windows.shape[1])
        if windows.shape[1] > count:
            # Coarse masks are enough to choose.
            quality, outlines, _ = self._rate(windows, prior, points, labels, boxes, refined=False)
            chosen = choose_distinct(quality, outlines, count, _SAME)
            windows = windows.gather(1, chosen[..., None].expand(-1, -1, 4))
            prior = None if prior is None else prior.gather(1, chosen)
        quality, _, masks = self._rate(windows, prior, points, labels, boxes, refined=True)
        quality, order = quality.sort(dim=1, descending=True)
        rows = torch.arange(len(windows), device=order.device)[:, None] * count
        masks = masks[(rows + order).flatten()]
        if boxes is not None and self.crop_to_boxes:
            masks = masks.crop(boxes)
        return PromptMasks(masks.scale(width / new_width, height / new_height, image.size), quality)

    def _candidates(
        self, points: Optional[Tensor], labels: Optional[Tensor], boxes: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The windows among which prompts choose, (B, K, 4), and the probabilities (B, K) that the network gives to windows of its grid."""
        image, generator = self._encoded(), self._generator
        if boxes is None:
            scores = image.features.scores[0]
            share = generator.mask_share
            numbers = candidate_windows(image.windows, scores, image.group_sizes, points, labels, share=share)
            return image.windows[numbers], scores[numbers].sigmoid()
        windows = generator.canonical_windows(boxes)[:, None]
        if points is None:
            return windows, None
        scales = windows.new_tensor(_BOX_SCALES)[:, None]
        centres, half = (windows[..., :2] + windows[..., 2:]) / 2, (windows[..., 2:] - windows[..., :2]) / 2
        return torch.cat([centres - scales * half, centres + scales * half], dim=2), None

    def _rate(
        self,
        windows: Tensor,
        prior: Optional[Tensor],
        points: Optional[Tensor],
        labels: Optional[Tensor],
        boxes: Optional[Tensor],
        *,
        refined: bool,
    ) -> tuple[Tensor, Tensor, WindowMasks]:
        """Decodes masks and estimates how well they fit their prompts.

        Returns:
            quality: (B, K) in 0..1.
            outlines: (B, K, 4) XYXY boxes of the masks in the frame of the resized image.
            masks: B * K masks in that frame.
        """
        image, generator = self._encoded(), self._generator
        prompts, candidates = windows.shape[:2]
        flat = windows.flatten(0, 1)
        chosen = None if refined else torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        with autocast(flat.device, self._predictor.dtype):
            logits = generator.decode(image.features, Windows(flat, refined=chosen))
        masks = WindowMasks(logits, flat, image.resized, threshold=generator.mask_threshold)
        outlines = grid_boxes(logits, flat, masks.threshold).view(prompts, candidates, 4)
        quality = expected_iou(masks).view(prompts, candidates)
        # Geometric means of two estimates.
        if prior is not None:
            quality = (quality * prior).sqrt()
        if boxes is not None:
            quality = (quality * box_iou(outlines, boxes[:, None])).sqrt()
        if points is not None:
            values = logits_at_points(logits.view(prompts, candidates, *logits.shape[1:]), windows, points)
            quality = quality * agreement(values, labels, masks.threshold)
        return quality, outlines, masks


def _first(*values: Any) -> Any:
    """The first of the values that is not None."""
    return next(value for value in values if value is not None)


def _either(value: Optional[ArrayLike], other: Optional[ArrayLike], name: str, other_name: str) -> Optional[ArrayLike]:
    if value is not None and other is not None:
        raise UserError(f"{name} and {other_name} are two names of one argument: give one of them")
    return other if value is None else value


def _numbers(values: ArrayLike, name: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} are not an array of numbers: rows of one length are expected") from None
    if not np.isfinite(array).all():
        raise UserError(f"{name} have a coordinate that is not finite")
    return array


def _read_boxes(boxes: ArrayLike) -> np.ndarray:
    """(B, 4) float64 of one or several boxes."""
    array = _numbers(boxes, "boxes")
    array = array.reshape(-1, 4) if array.size == 0 or array.shape == (4,) else array
    if array.ndim != 2 or array.shape[1] != 4:
        raise UserError(f"boxes have the shape {array.shape}: (4,) is expected for one box, (B, 4) for several")
    if (wrong := (array[:, 2:] < array[:, :2]).any(1)).any():
        i = int(wrong.argmax())
        raise UserError(f"box {i} is {array[i].tolist()}: x0, y0, x1, y1 is expected, with x0 <= x1 and y0 <= y1")
    return array


def _read_points(
    points: ArrayLike, labels: Optional[ArrayLike], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(B, P, 2) float64, the centres of the pixels in which the points lie, and their labels (B, P) int64."""
    array = _numbers(points, "points")
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != 2 or array.shape[1] == 0:
        raise UserError(
            f"points have the shape {np.shape(points)}: (P, 2) is expected for one prompt, (B, P, 2) for several"
        )
    marks = np.full(array.shape[:2], FOREGROUND) if labels is None else _numbers(labels, "point_labels")
    marks = marks[None] if marks.ndim == 1 else marks
    if marks.shape != array.shape[:2]:
        raise UserError(f"point_labels have the shape {np.shape(labels)}: one label per point is expected")
    if not np.isin(marks, (FOREGROUND, BACKGROUND, NO_POINT)).all():
        raise UserError("point_labels are 1 for the object, 0 for the background, and -1 for no point")
    limits = np.array(size[::-1], dtype=np.float64)
    outside = ((array < 0) | (array > limits)).any(2) & (marks != NO_POINT)
    if outside.any():
        point = array[tuple(np.argwhere(outside)[0])].tolist()
        raise UserError(f"the point {point} lies outside of the image of {size[1]} x {size[0]} pixels (x, y)")
    return np.minimum(np.floor(array), limits - 1).clip(0) + 0.5, marks.astype(np.int64)
