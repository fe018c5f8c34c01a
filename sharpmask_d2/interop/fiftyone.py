"""Masks as `fiftyone.Detections`. It needs FiftyOne: `pip install fiftyone`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from detectron2.structures import Instances

from ..extras import import_extra
from ..structures.tight_masks import TightMask
from .labelled_images import DEFAULT_LABEL, LabelledImage


def to_detections(image: LabelledImage, labels: Mapping[int, str]) -> Any:
    """The masks of an image of a file, for a field of a sample.

    Args:
        image: with its masks.
        labels: category id -> name.

    Returns:
        `fiftyone.Detections`: each has the mask in its tight box, the box as x, y, width and height relative to the image, and a
        confidence where the file has a score.

    Raises:
        UserError: FiftyOne is not installed.
    """
    fiftyone = import_extra("fiftyone", requirement="fiftyone")
    return fiftyone.Detections(
        detections=[
            fiftyone.Detection(
                label=labels[mask.category_id], confidence=mask.score, **_place(mask.tight(), image.size)
            )
            for mask in image.masks
        ]
    )


def proposals_to_detections(proposals: Instances, *, label: str = DEFAULT_LABEL) -> Any:
    """The proposals of `ProposalPredictor`, for a field of a sample.

    Args:
        proposals: with objectness_logits and proposal_masks.
        label: of all of them. Default: "object".

    Returns:
        `fiftyone.Detections` in the order of the proposals; the confidence is a probability.

    Raises:
        UserError: FiftyOne is not installed.
    """
    fiftyone = import_extra("fiftyone", requirement="fiftyone")
    scores = proposals.objectness_logits.double().sigmoid().tolist()
    return fiftyone.Detections(
        detections=[
            fiftyone.Detection(label=label, confidence=score, **_place(mask, proposals.image_size))
            for score, mask in zip(scores, proposals.proposal_masks.tight_masks())
        ]
    )


def _place(mask: TightMask, size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    x0, y0, x1, y1 = mask.box
    box = [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]
    return {"bounding_box": box, "mask": np.ascontiguousarray(mask.bitmap)}
