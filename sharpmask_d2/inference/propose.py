"""Proposals of many images, written as COCO results, as Detectron2's precomputed proposals and as pictures."""

from collections.abc import Sequence
from typing import Any, Optional

from .. import __version__
from ..io.fingerprint import config_settings
from ..io.outputs import check_outputs
from ..io.proposal_files import to_results
from ..io.shards import Shard
from .caching import keep_between_images
from .configuration import build_config
from .image_files import Work, find_images
from .predictor import ProposalPredictor
from .proposal_run import run_proposals
from .ranks import is_first_rank


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

    return run_proposals(
        images,
        settings,
        prepare,
        output=output,
        annotations=None if input else annotations,
        image_root=image_root,
        visualize=visualize,
        pkl=pkl,
        pkl_masks=pkl_masks,
        shard=shard,
    )
