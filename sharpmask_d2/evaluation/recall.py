"""Class-agnostic recall of proposals: AR, AR by object size, recall per IoU threshold, and AUC.

Proposals are matched to objects as in pycocotools' `COCOeval` with `useCats = 0`, so the figures equal those of COCOeval. Proposals are
matched once, by descending score. The rank of the proposal that is matched to an object therefore determines the recall at every number of
proposals N, and only these ranks are stored. The precision of all results of an image, for files of a few masks that were selected, follows
from the same matches.

Shape letters:
    D: proposals (detections) of an image, sorted by descending score
    G: ground-truth objects of an image, including crowds
    T: IoU thresholds
    A: area ranges
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Union

import numpy as np
from pycocotools import mask as mask_utils

from ..errors import UserError

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Areas in square pixels. Both bounds belong to a range, as in COCOeval: an object of exactly 32^2 pixels is both small and medium.
AREA_RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
# Numbers of proposals per image, N, at which recall is reported.
PROPOSAL_COUNTS = (10, 100, 1000)
# IoU thresholds in percent at which precision is reported.
PRECISION_IOUS = (50, 75)
# Rank of an object that no proposal is matched to.
UNMATCHED = np.iinfo(np.int32).max

# Boxes, (D, 4) XYWH in pixels of the original image; or D masks as compressed RLE in the frame of the original image.
Regions = Union[np.ndarray, list[dict]]


class GroundTruth(NamedTuple):
    """The objects of one image."""

    # Boxes or masks of the G objects.
    regions: Regions
    # (G,) `area` of the annotations in square pixels, which decides whether an object is small, medium or large.
    areas: np.ndarray
    # (G,) bool; crowds do not count as objects.
    is_crowd: np.ndarray


class ImageRecall(NamedTuple):
    """The result of matching one image."""

    # (A, T, G) int32, see `match_ranks`.
    ranks: np.ndarray
    # (A, G) bool, whether the object counts in the area range.
    counted: np.ndarray
    # (T,) int, number of proposals without those that are matched to no object but lie in a crowd.
    judged: np.ndarray
    # Number of proposals.
    count: int


def match_ranks(ious: np.ndarray, counted: np.ndarray, thresholds: np.ndarray = IOU_THRESHOLDS) -> np.ndarray:
    """Match proposals to objects greedily, by descending score.

    Each proposal is matched to the unmatched object of highest IoU that reaches the threshold; of equal IoUs the last object is
    chosen. Crowds and objects outside an area range are ignored: COCOeval matches a proposal to them only if no counted object
    remains for it, so they change precision but not recall.
    Source: `COCOeval.evaluateImg` of pycocotools.

    Args:
        ious: (D, G) IoUs, rows sorted by descending score.
        counted: (A, G) bool, whether the object counts in the area range.
        thresholds: (T,) IoU thresholds, ascending. Default: `IOU_THRESHOLDS`, 0.5 to 0.95.

    Returns:
        (A, T, G) int32, the index of the proposal matched to the object, or `UNMATCHED`.
    """
    num_gts, num_thresholds = ious.shape[1], len(thresholds)
    ranks = np.full((len(counted), num_thresholds, num_gts), UNMATCHED, dtype=np.int32)
    # D x G: number of thresholds that the IoU reaches.
    reached = np.searchsorted(np.minimum(thresholds, 1 - 1e-10), ious, side="right")
    candidates = np.flatnonzero(reached.any(axis=1))
    reached = reached[candidates]
    # Position of each object in the ascending order of the proposal's IoUs; of equal IoUs the last object has the highest position.
    order = np.argsort(ious[candidates], axis=1, kind="stable")
    preference = np.empty_like(order)
    np.put_along_axis(preference, order, np.arange(num_gts)[None], axis=1)
    threshold_index = np.arange(num_thresholds)[:, None]  # T x 1

    free = np.repeat(counted[:, None], num_thresholds, axis=1)  # A x T x G
    # The lowest threshold at which the object is unmatched in any area range. Most candidates fail this test.
    lowest_free = np.zeros(num_gts, dtype=int)
    for i, rank in enumerate(candidates):
        if not (reached[i] > lowest_free).any():
            continue
        key = np.where(free & (threshold_index < reached[i]), preference[i], -1)
        area, threshold = np.nonzero(key.max(axis=2) >= 0)
        matched = (area, threshold, key[area, threshold].argmax(axis=1))
        ranks[matched] = rank
        free[matched] = False
        still_free = free.any(axis=0)  # T x G
        lowest_free = np.where(still_free.any(axis=0), still_free.argmax(axis=0), num_thresholds)
    return ranks


def count_judged(crowd_ious: np.ndarray, ranks: np.ndarray, thresholds: np.ndarray = IOU_THRESHOLDS) -> np.ndarray:
    """Count the proposals that are right or wrong: all except those that are matched to no object but lie in a crowd.

    Source: `COCOeval.evaluateImg` of pycocotools.

    Args:
        crowd_ious: (D, number of crowds) share of the proposal that lies in the crowd, which is COCO's IoU with a crowd.
        ranks: (T, G), see `match_ranks`.
        thresholds: (T,) IoU thresholds. Default: `IOU_THRESHOLDS`, 0.5 to 0.95.

    Returns:
        (T,) int, at most D.
    """
    # T x D
    ignored = (crowd_ious[None] >= np.minimum(thresholds, 1 - 1e-10)[:, None, None]).any(axis=2)
    for row, matched in zip(ignored, ranks):
        row[matched[matched < UNMATCHED]] = False
    return (~ignored).sum(axis=1)


class RecallAccumulator:
    """Matches proposals image by image and reports class-agnostic recall, and precision if it is asked for.

    Recall is computed over all objects of all images that were added, without crowds. The objects of an image without proposals count as
    missed. If no object counts (in an area range, or at all), recall is nan (COCOeval reports -1).
    """

    def __init__(self, *, max_proposals: int = PROPOSAL_COUNTS[-1]) -> None:
        """
        Args:
            max_proposals: maximum number of proposals per image, at least 2; only the best ones are matched. It is also the upper limit of
                the AUC. Default: 1000.

        Raises:
            ValueError: `max_proposals` is less than 2.
        """
        if max_proposals < 2:
            raise ValueError(f"max_proposals must be at least 2, got {max_proposals}")
        self.max_proposals = max_proposals
        self.images: dict[Hashable, ImageRecall] = {}

    def add(self, image_id: Hashable, ground_truth: GroundTruth, proposals: Regions, scores: Sequence[float]) -> None:
        """Match the proposals of one image. An image that was added before is replaced.

        Args:
            image_id: identifier of the image.
            ground_truth: the G objects of the image.
            proposals: boxes or masks, of the same kind and in the same frame as `ground_truth.regions`, in any order.
            scores: one score per proposal, higher is better. Proposals of equal score keep their order.

        Raises:
            UserError: the numbers of proposals and scores differ, a score is nan, a box is not finite, or the size of a mask differs from
                that of the objects' masks.
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
        ranks = match_ranks(ious, counted)
        judged = count_judged(ious[:, is_crowd], ranks[0])
        self.images[image_id] = ImageRecall(ranks, counted, judged, len(order))

    def merge(self, others: Iterable["RecallAccumulator"]) -> None:
        """Add the images of other accumulators, such as those of other processes.

        Args:
            others: accumulators; an image that several of them have is counted once.
        """
        for other in others:
            self.images.update(other.images)

    def recall(self, count: int, area: str = "all") -> np.ndarray:
        """Compute the recall at every IoU threshold.

        Args:
            count: number of proposals per image.
            area: a key of `AREA_RANGES`. Default: "all".

        Returns:
            (T,) from 0 to 1; nan without objects.
        """
        ranks = self._counted_ranks(area)
        if not ranks.shape[1]:
            return np.full(len(IOU_THRESHOLDS), np.nan)
        return (ranks < count).mean(axis=1)

    def average_recall(self, counts: Sequence[int], area: str = "all") -> np.ndarray:
        """Compute AR, the recall averaged over the IoU thresholds.

        Args:
            counts: numbers of proposals per image.
            area: a key of `AREA_RANGES`. Default: "all".

        Returns:
            One AR per entry of `counts`, from 0 to 1; nan without objects.
        """
        ranks = self._counted_ranks(area)
        if not ranks.size:
            return np.full(len(counts), np.nan)
        return np.searchsorted(np.sort(ranks, axis=None), counts, side="left") / ranks.size

    def precision(self) -> np.ndarray:
        """Compute the precision at every IoU threshold: the share of the proposals of all images that are matched to an object.

        Proposals that are matched to no object but lie in a crowd are left out, as in COCOeval.

        Returns:
            (T,) from 0 to 1; nan without proposals.
        """
        right = (self._counted_ranks("all") < UNMATCHED).sum(axis=1)
        judged = np.sum([image.judged for image in self.images.values()], axis=0, initial=0) * np.ones_like(right)
        return np.divide(right, judged, out=np.full(len(right), np.nan), where=judged > 0)

    def auc(self, area: str = "all") -> float:
        """Compute the area under the curve of AR against log10(N), divided by the length of the axis.

        N runs over all integers from 1 to `max_proposals`, and the area between two of them is a trapezoid.
        Source: the AUC of the DeepMask paper. Its text does not name the axis; this axis reproduces its published figures.

        Args:
            area: a key of `AREA_RANGES`. Default: "all".

        Returns:
            The AUC from 0 to 1; nan without objects.
        """
        counts = np.arange(1, self.max_proposals + 1)
        average_recall = self.average_recall(counts, area)
        log_counts = np.log10(counts)
        heights = (average_recall[1:] + average_recall[:-1]) / 2
        return float((heights * np.diff(log_counts)).sum() / log_counts[-1])

    def summarize(self) -> dict[str, float]:
        """Compute all figures in percent.

        Returns:
            "AUC", and for each N of `PROPOSAL_COUNTS`: "AR@N", "AR@N-small", "AR@N-medium", "AR@N-large", and "Recall@N-IoU50" to
            "Recall@N-IoU95". A figure is nan if no object counts.
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

    def summarize_precision(self) -> dict[str, float]:
        """Compute the precision and the recall of all proposals of an image, at the IoU thresholds of `PRECISION_IOUS`.

        Returns:
            "Precision-IoU50", "Recall-IoU50" and so on in percent, and "Results-per-image", the mean number of proposals. A figure is nan
            if there are no proposals, no objects or no images.
        """
        precision, recall = self.precision(), self.recall(self.max_proposals)
        metrics = {}
        for threshold, *values in zip(IOU_THRESHOLDS, precision, recall):
            if round(100 * threshold) in PRECISION_IOUS:
                for name, value in zip(("Precision", "Recall"), values):
                    metrics[f"{name}-IoU{round(100 * threshold)}"] = 100 * float(value)
        counts = [image.count for image in self.images.values()]
        metrics["Results-per-image"] = float(np.mean(counts)) if counts else float("nan")
        return metrics

    def _counted_ranks(self, area: str) -> np.ndarray:
        """Ranks of the objects of all images that count in an area range: T x (number of objects)."""
        index = list(AREA_RANGES).index(area)
        ranks = [image.ranks[index][:, image.counted[index]] for image in self.images.values()]
        return np.concatenate([np.empty((len(IOU_THRESHOLDS), 0), dtype=np.int32)] + ranks, axis=1)


def _check_boxes(image_id: Hashable, boxes: np.ndarray, numbers: np.ndarray) -> None:
    """Refuse boxes that are not finite: pycocotools computes IoUs for them that pass every threshold."""
    bad = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if len(bad):
        raise UserError(f"image {image_id}: the box of proposal {numbers[bad[0]]} is {boxes[bad[0]].tolist()}")


def _check_mask_sizes(image_id: Hashable, gts: list[dict], proposals: list[dict]) -> None:
    """Refuse masks of different sizes: pycocotools returns an IoU of -1 for them and raises no error."""
    sizes = {tuple(rle["size"]) for rle in gts + proposals}
    if len(sizes) > 1:
        raise UserError(
            f"image {image_id}: masks of different sizes (height, width): {sorted(sizes)}; "
            "proposals must be in the frame of the original image"
        )
