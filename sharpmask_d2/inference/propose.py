"""Proposals of many images, written as COCO results, as Detectron2's precomputed proposals and as pictures."""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from .. import __version__
from ..io.fingerprint import config_settings
from ..io.outputs import check_outputs
from ..io.proposal_files import to_results
from ..io.shards import Shard
from ..visualization import choose_distinct, draw_masks
from .caching import keep_between_images
from .configuration import build_config
from .image_files import Work, find_images, report_command, run_images
from .predictor import ProposalPredictor
from .ranks import is_first_rank

# Maximum number of proposals that a picture shows, chosen among the best of the image.
_SHOWN = 8
_BEST = 200


def compute_proposals(
    *,
    output: str,
    input: Optional[Sequence[str]] = None,
    annotations: Optional[str] = None,
    image_root: Optional[str] = None,
    visualize: Optional[str] = None,
    pkl: Optional[str] = None,
    pkl_masks: bool = False,
    dtype: str = "float32",
    compiled: bool = False,
    shard: Optional[Shard] = None,
    **config: Any,
) -> int:
    """Computes the proposals of images and writes them. A run that was stopped resumes when it is started again with equal settings.

    Args:
        output: COCO result JSON to write.
        input: image files and folders; None reads the images from `annotations`.
        annotations: COCO JSON that lists the images; read only without `input`.
        image_root: folder of the images that `annotations` lists.
        visualize: folder for pictures of the best proposals; None writes none.
        pkl: file for Detectron2's precomputed proposals; None writes none.
        pkl_masks: whether that file holds the masks, too.
        dtype: see `ProposalPredictor`.
        compiled: see `ProposalPredictor`.
        shard: see `run_images`; not with `pkl`.
        config: see `build_config`.

    Returns:
        Exit status: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: an input does not exist.
        OutputError: see `check_outputs` and `ProposalWriter`.
        UserError: see `build_config` and `ProposalPredictor`.
    """
    keep_between_images()
    images = find_images(input, annotations, image_root)
    cfg = build_config(**config)
    check_outputs(
        {"--output": output, "--pkl": pkl} if is_first_rank() else {},
        inputs=[annotations, config.get("config_file"), cfg.MODEL.WEIGHTS],
        folders={"--visualize": visualize},
        images=[*(input or []), *(image.path for image in images)],
    )
    settings = {**config_settings(cfg), "--dtype": dtype, "--compile": compiled, "version": __version__}

    def prepare() -> Work:
        predictor = ProposalPredictor(cfg, dtype=dtype, compiled=compiled)
        return lambda image, pixels: to_results(predictor(pixels), image.image_id, **image.extra)

    def describe(count: int, num_images: int) -> str:
        return f"wrote {count} proposals of {num_images} images: {output}" + (f", {pkl}" if pkl else "")

    return run_images(
        images,
        output,
        settings,
        prepare,
        desc="proposals",
        describe=describe,
        next_command=report_command(output, images, None if input else annotations, image_root),
        draw=_draw_proposals,
        pictures=visualize,
        pickle_path=pkl,
        pickle_masks=pkl_masks,
        shard=shard,
    )


def _draw_proposals(pixels: np.ndarray, results: list[dict[str, Any]]) -> np.ndarray:
    rles = [result["segmentation"] for result in results[:_BEST]]
    return draw_masks(pixels, [rles[i] for i in choose_distinct(rles, _SHOWN)])
