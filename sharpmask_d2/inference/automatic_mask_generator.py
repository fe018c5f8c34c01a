"""The clean masks of a whole image: few, of high quality, each object once.

Shape letters: N masks, H W image.
"""

from typing import Any, Union

import cv2
import numpy as np
from detectron2.config import CfgNode
from pycocotools import mask as mask_utils

from ..errors import UserError
from ..structures import WindowMasks
from ..structures.mask_stability import mask_stability
from .predictor import AnyImage, ProposalPredictor
from .prompt_predictor import SharpMaskPredictor

_OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


class SharpMaskAutomaticMaskGenerator:
    """Masks of everything in an image, with the parameters and results of Segment Anything's `SamAutomaticMaskGenerator`.

    records = SharpMaskAutomaticMaskGenerator().generate(cv2.imread("photograph.jpg"))

    Where `ProposalPredictor` returns a ranked list that misses as few objects as possible, this returns the masks that a person would keep.
    """

    def __init__(
        self,
        cfg: Union[CfgNode, ProposalPredictor, None] = None,
        *,
        pred_iou_thresh: float = 0.55,
        stability_score_thresh: float = 0.0,
        stability_score_offset: float = 1.0,
        mask_nms_thresh: float = 0.5,
        min_mask_region_area: int = 100,
        non_overlapping: bool = False,
        output_mode: str = "binary_mask",
    ):
        """
        Args:
            cfg: a config of a stand-alone network on a feature pyramid; or a `ProposalPredictor`, whose model is shared. None takes the
                packaged model `model_zoo.DEFAULT`.
            pred_iou_thresh: lowest predicted IoU of a mask, in 0..1.
            stability_score_thresh: lowest stability of a mask, in 0..1; see `mask_stability`.
            stability_score_offset: difference in logits by which the threshold is moved to measure the stability.
            mask_nms_thresh: IoU of two masks above which the one of lower predicted IoU is removed; Segment Anything compares boxes.
            min_mask_region_area: area in pixels below which the separate parts and the holes of a mask are removed; 0 keeps them. A mask of
                which nothing is left is removed.
            non_overlapping: give each pixel to the mask of highest predicted IoU that holds it. Masks of which less than half remains are
                removed.
            output_mode: form of the masks: "binary_mask" (arrays), "coco_rle" (compressed, counts as text) or "uncompressed_rle" (counts as
                a list).

        Raises:
            UserError: a threshold or the mode is not valid; or see `SharpMaskPredictor`.
        """
        for name, value in (
            ("pred_iou_thresh", pred_iou_thresh),
            ("stability_score_thresh", stability_score_thresh),
            ("mask_nms_thresh", mask_nms_thresh),
        ):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}: it must lie in 0..1")
        if output_mode not in _OUTPUT_MODES:
            raise UserError(f"output_mode is {output_mode!r}: choose from {_OUTPUT_MODES}")
        self._predictor = SharpMaskPredictor(cfg)
        self.pred_iou_thresh, self.mask_nms_thresh = pred_iou_thresh, mask_nms_thresh
        self.stability_score_thresh, self.stability_score_offset = stability_score_thresh, stability_score_offset
        self.min_mask_region_area, self.non_overlapping = min_mask_region_area, non_overlapping
        self.output_mode = output_mode

    def generate(self, image: AnyImage, image_format: str = "BGR") -> list[dict[str, Any]]:
        """Segments an image.

        Args:
            image, image_format: see `SharpMaskPredictor.set_image`.

        Returns:
            One dict per mask, by descending predicted IoU:
                segmentation: (H, W) bool, or RLE, see `output_mode`.
                area: number of pixels.
                bbox: tight box, [x, y, width, height] in pixels.
                predicted_iou: in 0..1, the estimated IoU of the mask with its object.
                stability_score: in 0..1.
                point_coords: [[x, y]], centre of the mask's window in pixels, moved into the image.
                crop_box: [0, 0, W, H]; the image is never cropped.

        Raises:
            UserError: see `SharpMaskPredictor.set_image`.
        """
        self._predictor.set_image(image, image_format)
        masks, scores = self._predictor.predict_grid(min_score=self.pred_iou_thresh)
        self._predictor.reset_image()
        quality, order = scores[:, 0].sort(descending=True)
        masks = masks[order]
        stability = mask_stability(masks, margin=self.stability_score_offset)
        keep = ((stability >= self.stability_score_thresh) & masks.nonempty()).nonzero()[:, 0]
        masks, quality, stability = masks[keep], quality[keep], stability[keep]
        rles, numbers = self._clean(masks)
        height, width = masks.image_size
        records = []
        for rle, i in zip(rles, numbers):
            x0, y0, x1, y1 = masks.windows[i].tolist()
            centre = [min(max((x0 + x1) / 2, 0.0), width), min(max((y0 + y1) / 2, 0.0), height)]
            records.append(
                {
                    "segmentation": self._output(rle),
                    "area": int(mask_utils.area(rle)),
                    "bbox": mask_utils.toBbox(rle).tolist(),
                    "predicted_iou": float(quality[i]),
                    "point_coords": [centre],
                    "stability_score": float(stability[i]),
                    "crop_box": [0, 0, width, height],
                }
            )
        return records

    def _clean(self, masks: WindowMasks) -> tuple[list[dict], list[int]]:
        """Removes repeated masks, specks and holes, and overlaps if wanted.

        Returns:
            rles: of the masks that are left.
            numbers: which masks they are, ascending.
        """
        numbers = suppress(masks.rle(), self.mask_nms_thresh)
        taken = np.zeros(masks.image_size, dtype=bool)
        rles, left = [], []
        for i in numbers:
            bitmap = remove_small_regions(masks.paste(i)[0].cpu().numpy(), self.min_mask_region_area)
            if self.non_overlapping:
                whole = np.count_nonzero(bitmap)
                bitmap = remove_small_regions(bitmap & ~taken, self.min_mask_region_area) & ~taken
                if 2 * np.count_nonzero(bitmap) < whole:
                    continue
                taken |= bitmap
            if bitmap.any():
                rles.append(mask_utils.encode(np.asfortranarray(bitmap, dtype=np.uint8)))
                left.append(i)
        return rles, left

    def _output(self, rle: dict) -> Any:
        size = [int(side) for side in rle["size"]]
        if self.output_mode == "coco_rle":
            return {"size": size, "counts": rle["counts"].decode("ascii")}
        bitmap = mask_utils.decode(rle).astype(bool)
        if self.output_mode == "binary_mask":
            return bitmap
        flat = np.concatenate([[False], bitmap.ravel(order="F")])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        return {"size": size, "counts": np.diff(np.concatenate([[0], edges, [bitmap.size]])).tolist()}


def suppress(rles: list[dict], thresh: float) -> list[int]:
    """Greedy non-maximum suppression by the IoU of masks.

    Args:
        rles: N masks as compressed RLE, best first.
        thresh: IoU with a mask that is kept above which a mask is removed.

    Returns:
        Numbers of the masks that are kept, ascending.
    """
    if not rles:
        return []
    overlaps = np.asarray(mask_utils.iou(rles, rles, [0] * len(rles)))
    kept: list[int] = []
    for i in range(len(rles)):
        if not (overlaps[i, kept] > thresh).any():
            kept.append(i)
    return kept


def remove_small_regions(bitmap: np.ndarray, area: int) -> np.ndarray:
    """Fills the small holes of a mask, and then removes its small parts. Pixels that touch at a corner belong to one part.

    Args:
        bitmap: (H, W) bool.
        area: number of pixels below which a hole or a part is small.

    Returns:
        (H, W) bool; a new array.
    """
    bitmap = bitmap.copy()
    rows, columns = np.flatnonzero(bitmap.any(1)), np.flatnonzero(bitmap.any(0))
    if area <= 0 or not rows.size:
        return bitmap
    # With this margin, the background around the mask is not small within the part either.
    low = max(rows[0] - area, 0), max(columns[0] - area, 0)
    part = bitmap[low[0] : rows[-1] + 1 + area, low[1] : columns[-1] + 1 + area]
    for is_foreground in (False, True):
        regions = np.asarray(part if is_foreground else ~part, dtype=np.uint8)
        # Holes are parts of the background, which touch at edges only, or a diagonal line would not close them.
        _, labels, stats, _ = cv2.connectedComponentsWithStats(regions, connectivity=8 if is_foreground else 4)
        small = stats[:, cv2.CC_STAT_AREA] < area
        small[0] = False
        part[small[labels]] = not is_foreground
    return bitmap
