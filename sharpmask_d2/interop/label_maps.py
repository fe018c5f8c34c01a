"""Writes the masks of an image as one map of labels, without overlaps."""

import numpy as np

from .labelled_images import LabelledImage


def label_map(image: LabelledImage) -> np.ndarray:
    """The number of the best mask at each pixel.

    Args:
        image: with its masks, best first.

    Returns:
        (H, W) uint8, or uint16 if there are more than 255 masks: 0 for the background, n for the n-th best mask. A mask that lies
        entirely behind better ones has no pixel.

    Raises:
        ValueError: there are more than 65,535 masks.
    """
    count = len(image.masks)
    if count > np.iinfo(np.uint16).max:
        raise ValueError(f"a map of 16 bits has no room for {count} masks: keep fewer")
    labels = np.zeros(image.size, dtype=np.uint8 if count <= np.iinfo(np.uint8).max else np.uint16)
    for number, mask in reversed(list(enumerate(image.masks, start=1))):
        tight = mask.tight()
        x0, y0, x1, y1 = tight.box
        labels[y0:y1, x0:x1][tight.bitmap] = number
    return labels
