"""Proposals of many images by an exported model, in the files that `inference.propose` writes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from .. import __version__
from ..extras import TORCH, import_extra
from ..inference.caching import keep_between_images
from ..inference.image_files import InputImage, Work, find_images
from ..inference.proposal_run import run_proposals
from ..inference.ranks import is_first_rank
from ..io.fingerprint import digest_file
from ..io.outputs import check_outputs
from ..io.shards import Shard
from .model_file import ExportedModel
from .predictor import Predictor


def compute_proposals(
    *,
    model_folder: str,
    output: str,
    input: Optional[Sequence[str]] = None,
    annotations: Optional[str] = None,
    image_root: Optional[str] = None,
    visualize: Optional[str] = None,
    pkl: Optional[str] = None,
    pkl_masks: bool = False,
    num_proposals: Optional[int] = None,
    threads: Optional[int] = None,
    shard: Optional[Shard] = None,
) -> int:
    """Computes the proposals of images and writes them. A run that was stopped resumes when it is started again with equal settings.

    Args:
        model_folder: see `Predictor`.
        output, input, annotations, image_root, visualize, pkl, pkl_masks, shard: see `inference.propose.compute_proposals`.
        num_proposals, threads: see `Predictor`.

    Returns:
        Exit status: 1 if an image failed, else 0.

    Raises:
        FileNotFoundError: an input does not exist.
        OutputError: see `check_outputs` and `ProposalWriter`.
        UserError: see `Predictor`; or pictures are asked for, but OpenCV or pycocotools is not installed.
    """
    keep_between_images()
    if visualize:
        for library in ("cv2", "pycocotools"):
            import_extra(library, requirement=TORCH)
    images = find_images(input, annotations, image_root)
    model = ExportedModel.read(model_folder)
    files = sorted(path for path in Path(model_folder).iterdir() if path.is_file())
    check_outputs(
        {"--output": output, "--pkl": pkl} if is_first_rank() else {},
        inputs=[annotations, *files],
        folders={"--visualize": visualize},
        images=[*(input or []), *(image.path for image in images)],
    )
    settings = {
        "model": {**dataclasses.asdict(model), **({} if num_proposals is None else {"num_proposals": num_proposals})},
        "graphs": {path.name: f"content {digest_file(path)}" for path in files if path.suffix != ".json"},
        "version": __version__,
    }

    def prepare() -> Work:
        predictor = Predictor(model_folder, threads=threads, num_proposals=num_proposals)

        def work(image: InputImage, pixels: np.ndarray) -> list[dict[str, Any]]:
            return predictor(pixels).to_results(image.image_id, **image.extra)

        return work

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
