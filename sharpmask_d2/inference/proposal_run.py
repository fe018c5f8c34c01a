"""A run that computes the proposals of many images, whatever model computes them."""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np

from ..io.shards import Shard
from .image_files import InputImage, Work, report_command, run_images

# Maximum number of proposals that a picture shows, chosen among the best of the image.
_SHOWN = 8
_BEST = 200


def run_proposals(
    images: Sequence[InputImage],
    settings: dict[str, Any],
    prepare: Callable[[], Work],
    *,
    output: str,
    annotations: Optional[str],
    image_root: Optional[str],
    visualize: Optional[str],
    pkl: Optional[str],
    pkl_masks: bool,
    shard: Optional[Shard],
) -> int:
    """Computes the proposals of images and writes them: see `propose.compute_proposals`.

    Args:
        images: from `find_images`.
        settings, prepare: see `run_images`.
        output, image_root, visualize, pkl, pkl_masks, shard: see `compute_proposals`.
        annotations: COCO JSON that the images were listed by; None if they were found in folders.

    Returns:
        Exit status: 1 if an image failed, else 0.
    """

    def describe(count: int, num_images: int) -> str:
        return f"wrote {count} proposals of {num_images} images: {output}" + (f", {pkl}" if pkl else "")

    return run_images(
        images,
        output,
        settings,
        prepare,
        desc="proposals",
        describe=describe,
        next_command=report_command(output, images, annotations, image_root),
        draw=_draw_proposals,
        pictures=visualize,
        pickle_path=pkl,
        pickle_masks=pkl_masks,
        shard=shard,
    )


def _draw_proposals(pixels: np.ndarray, results: list[dict[str, Any]]) -> np.ndarray:
    # Only pictures need OpenCV and pycocotools.
    from ..visualization import choose_distinct, draw_masks

    rles = [result["segmentation"] for result in results[:_BEST]]
    return draw_masks(pixels, [rles[i] for i in choose_distinct(rles, _SHOWN)])
