"""IoU of the masks that a model makes of one click on each object.

Shape letters:
    G: objects of an image
    H, W: image height and width in pixels
"""

from collections.abc import Callable

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from ...structures import WindowMasks
from ..recall import AREA_RANGES
from .image_proposals import ImageProposals, in_area_ranges
from .tables import Table, percent

# Number of masks of a click.
MASKS_OF_CLICK = 3
# Decodes masks from clicks. Arguments: an image, (H, W, 3) uint8 BGR, and points, (G, 2) float64 XY in pixels of this image.
# Returns `MASKS_OF_CLICK` masks for each point, by descending score, in the frame of the image.
ClickDecoder = Callable[[np.ndarray, np.ndarray], WindowMasks]


def innermost_point(mask: np.ndarray) -> np.ndarray:
    """The pixel of a mask that is farthest from the background and from the border of the image.

    Args:
        mask: (H, W) bool, with at least one pixel.

    Returns:
        (2,) float64 XY, the centre of the pixel.
    """
    distance = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return np.array([x + 0.5, y + 0.5])


def decode_clicks(decode: ClickDecoder, image: np.ndarray, objects: list[dict]) -> list[list[dict]]:
    """Click once on each object, at its innermost point, and encode the masks as RLE.

    Args:
        decode: decodes masks from clicks; it is not called if there are no objects.
        image: (H, W, 3) uint8, BGR.
        objects: masks of the G objects as compressed RLE of size (H, W).

    Returns:
        For each object `MASKS_OF_CLICK` masks as compressed RLE, by descending score.

    Raises:
        ValueError: `decode` returns another number of masks.
    """
    if not objects:
        return []
    points = np.stack([innermost_point(mask_utils.decode(rle).astype(bool)) for rle in objects])
    rles = decode(image, points).rle()
    if len(rles) != MASKS_OF_CLICK * len(objects):
        raise ValueError(f"the decoder returned {len(rles)} masks for {len(objects)} clicks, not {MASKS_OF_CLICK} each")
    return [rles[i : i + MASKS_OF_CLICK] for i in range(0, len(rles), MASKS_OF_CLICK)]


class MasksGivenClicks:
    """Collects the IoUs of the masks of one click on each object: of the first, and of the best of three."""

    def __init__(self) -> None:
        self._areas, self._first, self._best = [], [], []

    def add(self, image: ImageProposals) -> None:
        """Measure the masks of one image.

        Args:
            image: an image with `masks_given_clicks`.
        """
        truth = image.objects.truth
        for area, region, decoded in zip(truth.areas, truth.regions, image.masks_given_clicks):
            ious = mask_utils.iou(decoded, [region], [0])[:, 0]
            self._areas.append(area)
            self._first.append(ious[0])
            self._best.append(ious.max())

    def tables(self) -> list[Table]:
        """Report the mean IoU over all objects, in percent, by size of the object.

        Returns:
            One table, "given clicks".
        """
        ranges = in_area_ranges(np.array(self._areas))
        named = {"first of three": self._first, "best of three": self._best}
        rows = [[name, *(percent(np.array(ious)[chosen]) for chosen in ranges)] for name, ious in named.items()]
        title = (
            "IoU given one click at the object's innermost point: the mask of highest score, and the best of the three masks.\n"
            "Mean over the objects, in percent"
        )
        return [Table("given clicks", title, ["", *AREA_RANGES], rows)]
