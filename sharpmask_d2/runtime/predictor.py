"""Computes the segment proposals of images with an exported model, without torch and without Detectron2.

Shape letters: H W height and width of an image in pixels, h w of the resized image.
"""

import os
from pathlib import Path
from typing import Optional, Union

import numpy as np
from PIL import Image

from ..data.images import to_pixels
from ..errors import UserError
from ..inference.caching import bound_kept_memory
from .backends import load_graphs
from .model_file import ExportedModel
from .proposals import Proposals, build_proposals
from .selection import select


class Predictor:
    """Computes segment proposals of images.

    predictor = Predictor("exported/")
    proposals = predictor("photograph.jpg")
    """

    def __init__(
        self,
        folder: Union[str, os.PathLike],
        *,
        threads: Optional[int] = None,
        num_proposals: Optional[int] = None,
    ):
        """
        Args:
            folder: that `sharpmask export-model` has written.
            threads: number of CPU threads of the network; None: one per core.
            num_proposals: maximum number of proposals per image; None: as exported.

        Raises:
            UserError: the folder has no exported model, or the library that runs it is not installed; the message says what to do.
        """
        self.model = ExportedModel.read(folder)
        self.num_proposals = self.model.num_proposals if num_proposals is None else num_proposals
        if self.num_proposals < 1:
            raise UserError(f"num_proposals is {num_proposals}: it must be at least 1")
        self._encoder, self._decoder = load_graphs(Path(folder), self.model, self.num_proposals, threads)

    def __call__(self, image: Union[np.ndarray, str, Path, Image.Image]) -> Proposals:
        """Computes the proposals of an image.

        Args:
            image: (H, W, 3) uint8 in BGR order, as cv2.imread returns it; or a grey image, a path or an image of Pillow, see
                `data.images.to_pixels`.

        Returns:
            The proposals in the frame of the image.

        Raises:
            ImageError: the argument is no image of these kinds, or has no pixels.
        """
        pixels = to_pixels(image)
        size = pixels.shape[:2]
        resized = resize(pixels, self.model.min_size, self.model.max_size)
        image_size = resized.shape[:2]
        if self.model.channels == "RGB":
            resized = resized[:, :, ::-1]
        divisor = self.model.size_divisibility
        padded = np.zeros((*(-(-side // divisor) * divisor for side in image_size), 3), np.uint8)
        padded[: image_size[0], : image_size[1]] = resized
        sides = np.array(image_size, np.int64)
        scores, *tables = self._encoder.run([padded, sides])
        windows = select(scores, image_size, self.model, self.num_proposals)
        # Refined windows first, as the decoder returns their masks.
        order = np.argsort(~windows.refined, kind="stable")
        boxes, refined = windows.boxes[order], int(windows.refined.sum())
        logits = self._decoder(tables, sides, boxes[:refined], boxes[refined:])
        proposals = build_proposals(windows.scores[order], logits, boxes, image_size, size, self.model)
        bound_kept_memory()
        return proposals


def resize(pixels: np.ndarray, min_size: int, max_size: int) -> np.ndarray:
    """The image in the size that the model was trained for, as Detectron2's `ResizeShortestEdge` resizes it.

    Args:
        pixels: (H, W, 3) uint8.
        min_size, max_size: shorter side and maximum of the longer side of the result in pixels.

    Returns:
        (h, w, 3) uint8.
    """
    height, width = pixels.shape[:2]
    # In the order in which Detectron2 rounds.
    scale = min_size / min(height, width)
    h, w = (min_size, scale * width) if height < width else (scale * height, min_size)
    if max(h, w) > max_size:
        scale = max_size / max(h, w)
        h, w = h * scale, w * scale
    h, w = int(h + 0.5), int(w + 0.5)
    if (h, w) == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((w, h), Image.BILINEAR))
