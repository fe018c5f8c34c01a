"""Class-agnostic recall of proposals, one image at a time: AR, AR by object size, recall per IoU threshold, AUC.

Matching is that of pycocotools' `COCOeval` with `useCats = 0`, so the figures are its figures. Since proposals are
matched once, in the order of their scores, the rank of the proposal that took an object tells recall at every number of
proposals N: that rank is all that is kept of an image.

Shape letters:
    D: proposals (detections) of an image, best first
    G: ground-truth objects of an image, crowds included
    T: IoU thresholds
    A: area ranges
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Union

import numpy as np
from pycocotools import mask as mask_utils

from ..errors import UserError

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Both ends belong to a range, as in COCOeval: an object of exactly 32^2 pixels is small and medium.
AREA_RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
PROPOSAL_COUNTS = (10, 100, 1000)
# The rank kept for an object that no proposal took.
UNMATCHED = np.iinfo(np.int32).max

# Boxes as an array, D x 4, XYWH in pixels; masks as a list of D compressed COCO RLEs.
Regions = Union[np.ndarray, list]


class GroundTruth(NamedTuple):
    """The objects of one image.

    regions: boxes or masks (`Regions`) in the frame of the original image. areas: G, the annotations' `area` in square
    pixels, which decides on small, medium and large. is_crowd: G bool; crowds count in no recall.
    """

    regions: Regions
    areas: np.ndarray
    is_crowd: np.ndarray


class ImageRecall(NamedTuple):
    """What is kept of one image.

    ranks: A x T x G int32, see `match_ranks`. counted: A x G bool, the objects that count in the area range.
    """

    ranks: np.ndarray
    counted: np.ndarray


def match_ranks(ious: np.ndarray, counted: np.ndarray, thresholds: np.ndarray = IOU_THRESHOLDS) -> np.ndarray:
    """Match proposals to objects greedily, best proposal first.

    A proposal takes the free object of highest IoU among those that reach the threshold (the last one of equals). Objects
    that do not count in an area range are passed over: COCOeval gives them a proposal only when no object that counts is
    left for it, so they change precision but never recall. The same holds for crowds.
    Source: `COCOeval.evaluateImg` of pycocotools.

    Args:
        ious: D x G, proposals best first.
        counted: A x G bool.
        thresholds: T, ascending.

    Returns:
        A x T x G int32: the index of the proposal that took the object, UNMATCHED where none did.
    """
    num_gts, num_thresholds = ious.shape[1], len(thresholds)
    ranks = np.full((len(counted), num_thresholds, num_gts), UNMATCHED, dtype=np.int32)
    # D x G: how many thresholds the pair reaches.
    reached = np.searchsorted(np.minimum(thresholds, 1 - 1e-10), ious, side="right")
    candidates = np.flatnonzero(reached.any(axis=1))
    reached = reached[candidates]
    # Objects in the order of the proposal's liking, as whole numbers so that of equal IoUs the last is the highest.
    order = np.argsort(ious[candidates], axis=1, kind="stable")
    liking = np.empty_like(order)
    np.put_along_axis(liking, order, np.arange(num_gts)[None], axis=1)
    threshold_index = np.arange(num_thresholds)[:, None]  # T x 1

    free = np.repeat(counted[:, None], num_thresholds, axis=1)  # A x T x G
    # The lowest threshold at which the object is still free in some area range: most candidates end at this test.
    lowest_free = np.zeros(num_gts, dtype=int)
    for i, rank in enumerate(candidates):
        if not (reached[i] > lowest_free).any():
            continue
        key = np.where(free & (threshold_index < reached[i]), liking[i], -1)
        area, threshold = np.nonzero(key.max(axis=2) >= 0)
        taken = (area, threshold, key[area, threshold].argmax(axis=1))
        ranks[taken] = rank
        free[taken] = False
        still_free = free.any(axis=0)  # T x G
        lowest_free = np.where(still_free.any(axis=0), still_free.argmax(axis=0), num_thresholds)
    return ranks


class RecallAccumulator:
    """Collects matching results image by image and reports class-agnostic recall.

    Recall is over all objects of all images added, crowds left out; an image without proposals counts its objects.
    Where no object counts (in an area range, or at all) recall is nan (COCOeval: -1).

    Args:
        max_proposals: of an image's proposals only the best so many take part, and AUC runs up to this N.
    """

    def __init__(self, *, max_proposals: int = PROPOSAL_COUNTS[-1]) -> None:
        if max_proposals < 2:
            raise ValueError(f"max_proposals must be at least 2, got {max_proposals}")
        self.max_proposals = max_proposals
        self.images: dict[Hashable, ImageRecall] = {}

    def add(self, image_id: Hashable, ground_truth: GroundTruth, proposals: Regions, scores: Sequence[float]) -> None:
        """Match one image's proposals and keep the result; an image added before is replaced.

        Args:
            image_id: names the image.
            ground_truth: its objects, G.
            proposals: D boxes or masks, of the kind and in the frame of `ground_truth.regions`, in any order.
            scores: D; of equal scores the first goes first.

        Raises:
            ValueError: numbers of proposals and scores differ, a score is nan, a box is not finite, or a mask is not of the size
                of the ground truth's masks.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if len(proposals) != len(scores):
            raise UserError(f"image {image_id}: {len(proposals)} proposals but {len(scores)} scores")
        if np.isnan(scores).any():
            raise UserError(f"image {image_id}: the score of proposal {int(np.isnan(scores).argmax())} is nan")
        order = np.argsort(-scores, kind="stable")[: self.max_proposals]
        if isinstance(proposals, np.ndarray):
            proposals = proposals[order]
            _check_boxes(image_id, proposals, order)
        else:
            proposals = [proposals[i] for i in order]
            _check_mask_sizes(image_id, ground_truth.regions, proposals)
        is_crowd = np.asarray(ground_truth.is_crowd, dtype=bool)
        areas = np.asarray(ground_truth.areas, dtype=np.float64)
        bounds = np.array(list(AREA_RANGES.values()))  # A x 2
        counted = ~is_crowd & (areas >= bounds[:, :1]) & (areas <= bounds[:, 1:])  # A x G
        ious = np.zeros((len(order), len(areas)))
        if ious.size:
            ious = mask_utils.iou(proposals, ground_truth.regions, is_crowd.astype(np.uint8))
        self.images[image_id] = ImageRecall(match_ranks(ious, counted), counted)

    def merge(self, others: Iterable["RecallAccumulator"]) -> None:
        """Take over the images of other accumulators (of other processes, say)."""
        for other in others:
            self.images.update(other.images)

    def recall(self, count: int, area: str = "all") -> np.ndarray:
        """Recall at `count` proposals an image and every IoU threshold, for the objects of one of AREA_RANGES.

        Returns:
            T, from 0 to 1, nan without objects.
        """
        ranks = self._counted_ranks(area)
        if not ranks.shape[1]:
            return np.full(len(IOU_THRESHOLDS), np.nan)
        return (ranks < count).mean(axis=1)

    def average_recall(self, counts: Sequence[int], area: str = "all") -> np.ndarray:
        """AR: recall averaged over the IoU thresholds, at each of `counts` proposals an image.

        Returns:
            As many as `counts`, from 0 to 1, nan without objects.
        """
        ranks = self._counted_ranks(area)
        if not ranks.size:
            return np.full(len(counts), np.nan)
        return np.searchsorted(np.sort(ranks, axis=None), counts, side="left") / ranks.size

    def auc(self, area: str = "all") -> float:
        """The area under AR against log10(N), N from 1 to max_proposals, divided by the width of that range.

        Trapezoids between all whole N. From 0 to 1, nan without objects.
        Source: the AUC of the DeepMask paper, whose text leaves the axis open; this one gives its published figures.
        """
        counts = np.arange(1, self.max_proposals + 1)
        average_recall = self.average_recall(counts, area)
        log_counts = np.log10(counts)
        heights = (average_recall[1:] + average_recall[:-1]) / 2
        return float((heights * np.diff(log_counts)).sum() / log_counts[-1])

    def summarize(self) -> dict[str, float]:
        """All figures in percent.

        Returns:
            For each N of PROPOSAL_COUNTS "AR@N", "AR@N-small", "AR@N-medium", "AR@N-large" and "Recall@N-IoU50" to
            "Recall@N-IoU95"; and "AUC". nan where no object counts.
        """
        metrics = {f"AR@{count}": self.average_recall([count])[0] for count in PROPOSAL_COUNTS}
        metrics["AUC"] = self.auc()
        for area in list(AREA_RANGES)[1:]:
            values = self.average_recall(PROPOSAL_COUNTS, area)
            metrics.update({f"AR@{count}-{area}": value for count, value in zip(PROPOSAL_COUNTS, values)})
        for count in PROPOSAL_COUNTS:
            for threshold, value in zip(IOU_THRESHOLDS, self.recall(count)):
                metrics[f"Recall@{count}-IoU{round(100 * threshold)}"] = value
        return {key: 100 * float(value) for key, value in metrics.items()}

    def _counted_ranks(self, area: str) -> np.ndarray:
        """T x (objects of all images that count in this area range)."""
        index = list(AREA_RANGES).index(area)
        ranks = [image.ranks[index][:, image.counted[index]] for image in self.images.values()]
        return np.concatenate([np.empty((len(IOU_THRESHOLDS), 0), dtype=np.int32)] + ranks, axis=1)


def _check_boxes(image_id: Hashable, boxes: np.ndarray, numbers: np.ndarray) -> None:
    """pycocotools gives a box that is not finite an IoU that no threshold turns away."""
    bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if len(bad):
        raise UserError(f"image {image_id}: the box of proposal {numbers[bad[0]]} is {boxes[bad[0]].tolist()}")


def _check_mask_sizes(image_id: Hashable, gts: list, proposals: list) -> None:
    """pycocotools gives masks of different frames an IoU of -1 instead of an error."""
    sizes = {tuple(rle["size"]) for rle in gts + proposals}
    if len(sizes) > 1:
        raise UserError(
            f"image {image_id}: masks of different sizes (height, width): {sorted(sizes)}; "
            "proposals must be in the frame of the original image"
        )
