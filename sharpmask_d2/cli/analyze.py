"""Analyses of proposals: what tools/analyze_proposals.py does.

Shape letters: G boxes, H W image.
"""

from typing import Optional

import numpy as np
import torch

from ..data.coco import load_annotations
from ..evaluation.analysis import BoxDecoder, analyze, images_of_model, images_of_results, window_rule
from ..evaluation.proposal_evaluation import write_json
from ..inference.caching import keep_between_images
from ..inference.predictor import ProposalPredictor, prepare_image
from ..inference.preparation import autocast
from ..inference.propose import build_config
from ..modeling.meta_arch import SegmentProposalNetwork
from ..structures import WindowMasks


def analyze_proposals(
    *,
    annotations: str,
    proposals: Optional[str] = None,
    image_root: Optional[str] = None,
    output: Optional[str] = None,
    dtype: str = "float32",
    **config,
) -> None:
    """Print the tables of all analyses that the proposals allow; see tools/analyze_proposals.py.

    Args:
        annotations: a COCO annotation file.
        proposals: a COCO result file; or
        image_root: folder of the images, of which a model makes proposals, whose windows are then known, too.
        output: JSON to write the tables to.
        dtype: see `ProposalPredictor`.
        config: see `compute.build_config`; read with `image_root`.

    Raises:
        OSError, ValueError: a file is not there, or not of its format; the message says which.
    """
    coco = load_annotations(annotations)
    if proposals is not None:
        tables = analyze(images_of_results(coco, proposals))
    else:
        keep_between_images()
        cfg = build_config(**config)
        predictor = ProposalPredictor(cfg, dtype=dtype)
        decode = box_decoder(predictor)
        images = images_of_model(coco, image_root, predictor, decode)
        tables = analyze(images, rule=window_rule(cfg, predictor.model), given_boxes=decode is not None)
    print("\n\n".join(table.text() for table in tables))
    if output:
        write_json({table.name: table.records() for table in tables}, output)


def box_decoder(predictor: ProposalPredictor) -> Optional[BoxDecoder]:
    """What makes masks of given boxes, in the canonical windows of the boxes.

    Args:
        predictor: of any model.

    Returns:
        None for a model on an image pyramid, which makes masks only of windows of its own.
    """
    if not isinstance(predictor.model, SegmentProposalNetwork):
        return None
    generator = predictor.model.proposal_generator

    @torch.no_grad()
    def decode(image: np.ndarray, boxes: np.ndarray) -> WindowMasks:
        inputs = prepare_image(image, predictor.resize, predictor.cfg)
        (old_height, old_width), (height, width) = image.shape[:2], inputs["image"].shape[1:]
        scaled = torch.from_numpy(boxes * ([width / old_width, height / old_height] * 2)).float()
        windows = generator.canonical_windows(scaled.to(predictor.model.device))
        with autocast(predictor.model.device, predictor.dtype):
            pyramid, _ = predictor.model.pyramid([inputs])
            logits = generator.decode(pyramid, torch.zeros_like(windows[:, 0], dtype=torch.long), windows)
        masks = WindowMasks(logits, windows, (height, width), threshold=generator.mask_threshold)
        return masks.scale(old_width / width, old_height / height, (old_height, old_width))

    return decode
