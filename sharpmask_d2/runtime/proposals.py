"""The proposals of an image, and how they are made from the masks of windows. The results equal those of `structures.build_proposals`.

Shape letters: N proposals, M mask side in cells, H W height and width of the image in pixels.
"""

import math
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from ..io.proposal_files import make_results
from .edges import boxes_and_areas, encode, fill
from .model_file import ExportedModel
from .outlines import Edges, Outlines, pack
from .ranking import MARGIN, log_sigmoid, log_to_logit, matrix_nms, nms, stability


class Masks:
    """N masks of an image. Run-length encodings and bitmaps are computed when they are asked for."""

    def __init__(self, edges: Edges):
        """
        Args:
            edges: of N masks, whose pitch is the height of the image.
        """
        self._edges = edges

    def __len__(self) -> int:
        return self._edges.count

    def __getitem__(self, item: Union[int, slice, np.ndarray]) -> "Masks":
        """Some of the masks.

        Args:
            item: which masks: an int (the result has one mask), a slice, or a bool or int array.
        """
        return Masks(self._edges.select(np.atleast_1d(np.arange(len(self))[item])))

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self._edges.size

    def areas(self) -> np.ndarray:
        """(N,) int64, number of foreground pixels of each mask."""
        return boxes_and_areas(self._edges)[1]

    def rle(self) -> list[dict]:
        """N dicts {"size": [H, W], "counts": str}: pycocotools' compressed RLE, with counts as text so that JSON can hold them."""
        return encode(self._edges)

    def paste(self, indices: Union[int, slice, np.ndarray, None] = None) -> np.ndarray:
        """Bitmaps of the full image.

        Args:
            indices: which masks, in any form that `masks[indices]` accepts; all by default.

        Returns:
            (number of masks chosen, H, W) bool.
        """
        return fill((self if indices is None else self[indices])._edges)


class Proposals(NamedTuple):
    """The proposals of an image, best first, in the frame of the image."""

    # (N, 4) float32 XYXY in pixels: the tight boxes of the masks.
    boxes: np.ndarray
    # (N,) float32 logits.
    objectness_logits: np.ndarray
    masks: Masks

    @property
    def scores(self) -> np.ndarray:
        """(N,) float64, probabilities."""
        return 1 / (1 + np.exp(-self.objectness_logits.astype(np.float64)))

    def to_results(self, image_id: Union[int, str], **extra: Any) -> list[dict[str, Any]]:
        """The proposals as COCO results: see `io.proposal_files.to_results`.

        Args:
            image_id: as in the annotations.
            extra: further entries of every result.
        """
        return make_results(self.boxes, self.scores.tolist(), self.masks.rle(), image_id, **extra)


def build_proposals(
    scores: np.ndarray,
    logits: np.ndarray,
    windows: np.ndarray,
    image_size: tuple[int, int],
    output_size: Optional[tuple[int, int]],
    model: ExportedModel,
) -> Proposals:
    """Ranks the masks of windows, suppresses some, and computes tight boxes.

    Args:
        scores: (N,) float32 logits of the windows, in any order.
        logits: (N, M, M) float32.
        windows: (N, 4) float32 XYXY in pixels of the resized image.
        image_size: (H, W) of the resized image.
        output_size: (H, W) of the image that the proposals refer to; None: `image_size`.
        model: what the file of the exported model says.

    Returns:
        At most N proposals. Windows whose mask is empty inside the image, or whose score is not finite, are left out.
    """
    size = image_size if output_size is None else output_size
    windows = windows * np.array([size[1] / image_size[1], size[0] / image_size[0]] * 2, np.float32)
    threshold = math.log(model.mask_threshold / (1 - model.mask_threshold))
    bits, *others = pack(logits, [threshold, threshold + MARGIN, threshold - MARGIN][: 3 if model.stability else 1])
    if model.stability:
        scores = log_to_logit(log_sigmoid(scores) + np.log(stability(*others)))
    outlines = Outlines(logits, threshold, bits)
    edges = outlines.edges(windows, size, size[0])
    boxes, areas = boxes_and_areas(edges)
    order = np.argsort(-scores, kind="stable")
    order = order[(areas[order] > 0) & np.isfinite(scores[order])]
    if model.nms_thresh < 1:
        order = order[nms(boxes[order], model.nms_thresh)]
    scores = scores[order]
    if model.mask_nms:
        scores = matrix_nms(scores, outlines, windows, size, order)
        again = np.argsort(-scores, kind="stable")
        order, scores = order[again], scores[again]
    return Proposals(boxes[order], scores, Masks(edges.select(order)))
