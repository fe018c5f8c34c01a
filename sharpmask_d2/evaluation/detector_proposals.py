"""Recall of the proposals that detectors work on: those of an online generator, and those of precomputed files."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Optional

import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from torch import nn

from ..data.proposal_mapper import get_proposal_dicts, load_proposal_masks
from ..io.proposal_files import split_rles
from ..structures import rescale_proposals
from .proposal_evaluation import ProposalEvaluator

# Before the keys of proposals, which are otherwise those of detections.
PREFIX = "proposal_"

_KEY = "generated_proposals"


class WithGeneratedProposals(nn.Module):
    """A detector in evaluation that also hands out what its generator proposed, for `GeneratedProposalEvaluator`."""

    def __init__(self, detector: nn.Module):
        """
        Args:
            detector: with a proposal_generator whose proposals have masks; as it is, or wrapped for several processes.
        """
        super().__init__()
        self.detector = getattr(detector, "module", detector)
        # Whoever evaluates puts back the mode that it finds.
        self.training = detector.training

    def forward(self, batched_inputs: list) -> list:
        """
        Returns:
            the detector's outputs, each with `generated_proposals`: Instances in the frame of the original image.
        """
        seen = []
        handle = self.detector.proposal_generator.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        try:
            outputs = self.detector(batched_inputs)
        finally:
            handle.remove()
        return [
            {**output, _KEY: rescale_proposals(proposals, inputs.get("height"), inputs.get("width"))}
            for inputs, output, proposals in zip(batched_inputs, outputs, seen[0])
        ]


class GeneratedProposalEvaluator(ProposalEvaluator):
    """`ProposalEvaluator` of what `WithGeneratedProposals` hands out; its keys are proposal_segm and proposal_bbox."""

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        super().process(inputs, [{"proposals": output[_KEY]} for output in outputs])

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        return _prefixed(super().evaluate())


def evaluate_proposal_file(
    dataset_name: str, proposal_file: str, *, output_dir: Optional[str] = None
) -> "OrderedDict[str, dict[str, float]]":
    """The figures of precomputed proposals, exactly as the file has them: of boxes, and of masks where it has some.

    Args:
        dataset_name: a registered dataset in COCO format.
        proposal_file: pickle of its images, as Detectron2 reads them.
        output_dir: see `ProposalEvaluator`.

    Returns:
        see `ProposalEvaluator.evaluate`, with the keys proposal_segm and proposal_bbox.

    Raises:
        FileNotFoundError, ValueError: see `data.proposal_mapper.get_proposal_dicts`.
    """
    logging.getLogger(__name__).info(f"Recall of the proposals in {proposal_file}")
    evaluator = ProposalEvaluator(dataset_name, output_dir=output_dir)
    dicts = get_proposal_dicts([dataset_name], [proposal_file], filter_empty=False)
    for record in load_proposal_masks(dicts, proposal_file)[comm.get_rank() :: comm.get_world_size()]:
        evaluator.process([record], [{"proposals": _from_file(record)}])
    return _prefixed(evaluator.evaluate())


class _Rles(list):
    """RLEs in the place of window masks."""

    def rle(self) -> list:
        return list(self)


def _from_file(record: dict) -> Instances:
    proposals = Instances((record["height"], record["width"]))
    boxes = BoxMode.convert(record["proposal_boxes"], record["proposal_bbox_mode"], BoxMode.XYXY_ABS)
    proposals.proposal_boxes = Boxes(boxes)
    proposals.objectness_logits = torch.as_tensor(record["proposal_objectness_logits"])
    if "proposal_masks" in record:
        rles = split_rles(record["proposal_masks"])
        proposals.proposal_masks = _Rles(rles[i] for i in record["proposal_masks"]["order"])
    return proposals


def _prefixed(metrics: dict) -> OrderedDict:
    return OrderedDict((PREFIX + key, values) for key, values in metrics.items())
