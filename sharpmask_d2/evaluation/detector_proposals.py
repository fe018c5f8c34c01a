"""Recall of the proposals that a detector uses: those of its own proposal generator, or precomputed ones from a file."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Optional

import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from torch import nn

from ..data.proposal_mapper import get_proposal_dicts, load_proposal_masks
from ..io.proposal_files import split_rles
from ..structures import rescale_proposals
from .proposal_evaluation import ProposalEvaluator

# Prefix of the result keys of proposals, which distinguishes them from those of detections.
PREFIX = "proposal_"

_KEY = "generated_proposals"


class WithGeneratedProposals(nn.Module):
    """Wraps a detector so that its outputs contain the proposals of its generator, as `GeneratedProposalEvaluator` needs them."""

    def __init__(self, detector: nn.Module):
        """
        Args:
            detector: a detector with a `proposal_generator`, or `DistributedDataParallel` around one.
        """
        super().__init__()
        self.detector = getattr(detector, "module", detector)
        # `inference_on_dataset` restores the mode of the model that it was given.
        self.training = detector.training

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Run the detector and record its proposals.

        Args:
            batched_inputs: dicts in Detectron2's format, one per image.

        Returns:
            The outputs of the detector, each with the additional key "generated_proposals": `Instances` in the frame of the original image.
        """
        recorded = []
        generator = self.detector.proposal_generator
        handle = generator.register_forward_hook(lambda module, args, out: recorded.append(out[0]))
        try:
            outputs = self.detector(batched_inputs)
        finally:
            handle.remove()
        return [
            {**output, _KEY: rescale_proposals(proposals, inputs.get("height"), inputs.get("width"))}
            for inputs, output, proposals in zip(batched_inputs, outputs, recorded[0])
        ]


class GeneratedProposalEvaluator(ProposalEvaluator):
    """`ProposalEvaluator` for the outputs of `WithGeneratedProposals`. Its result keys are "proposal_segm" and "proposal_bbox"."""

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Match the proposals of a batch of images.

        Args:
            inputs: one dict per image with "image_id".
            outputs: outputs of `WithGeneratedProposals`.

        Raises:
            UserError: see `ProposalEvaluator.process`.
        """
        super().process(inputs, [{"proposals": output[_KEY]} for output in outputs])

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Compute the figures over all images of the dataset.

        Returns:
            {"proposal_segm": figures, "proposal_bbox": figures}, see `ProposalEvaluator.evaluate`.

        Raises:
            UserError: see `ProposalEvaluator.evaluate`.
        """
        return _prefixed(super().evaluate())


def evaluate_proposal_file(
    dataset_name: str, proposal_file: str, *, output_dir: Optional[str] = None
) -> "OrderedDict[str, dict[str, float]]":
    """Compute the recall of precomputed proposals, unchanged, as the file contains them: of boxes and, if present, of masks.

    Args:
        dataset_name: a registered dataset in COCO format.
        proposal_file: path of a proposal file (pickle) of this dataset in Detectron2's format.
        output_dir: folder in which `proposal_metrics.json` is written. Default: None, no file.

    Returns:
        {"proposal_segm": figures, "proposal_bbox": figures}, see `ProposalEvaluator.evaluate`.

    Raises:
        FileNotFoundError: the proposal file does not exist.
        UserError: the file is broken or belongs to another dataset; see `data.proposal_mapper.get_proposal_dicts`.
    """
    logging.getLogger(__name__).info(f"Computing the recall of the proposals in {proposal_file}")
    evaluator = ProposalEvaluator(dataset_name, output_dir=output_dir)
    dicts = get_proposal_dicts([dataset_name], [proposal_file], filter_empty=False)
    for record in load_proposal_masks(dicts, proposal_file)[comm.get_rank() :: comm.get_world_size()]:
        evaluator.process([record], [{"proposals": _from_file(record)}])
    return _prefixed(evaluator.evaluate())


class _RleMasks(list):
    """Masks as RLE, with the method of window masks that `ProposalEvaluator` calls."""

    def rle(self) -> list[dict]:
        return list(self)


def _from_file(record: dict[str, Any]) -> Instances:
    proposals = Instances((record["height"], record["width"]))
    boxes = BoxMode.convert(record["proposal_boxes"], record["proposal_bbox_mode"], BoxMode.XYXY_ABS)
    proposals.proposal_boxes = Boxes(boxes)
    proposals.objectness_logits = torch.as_tensor(record["proposal_objectness_logits"])
    if "proposal_masks" in record:
        rles = split_rles(record["proposal_masks"])
        proposals.proposal_masks = _RleMasks(rles[i] for i in record["proposal_masks"]["order"])
    return proposals


def _prefixed(metrics: dict[str, dict[str, float]]) -> "OrderedDict[str, dict[str, float]]":
    return OrderedDict((PREFIX + key, values) for key, values in metrics.items())
