"""Evaluation of masks and scores on training patches, as in the released code."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..modeling.losses import mask_iou


class PatchEvaluator(DatasetEvaluator):
    """Evaluates the patches of `SharpMaskProposalNetwork`: IoU of the masks at probability 0.5, and accuracy of the scores.

    Shape letters: P patches of an image, M side of a mask.
    """

    def __init__(self, *, distributed: bool = True):
        """
        Args:
            distributed: gather the results of all processes; only the main process then reports. Default: True.
        """
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Discard the results of all patches."""
        self.ious, self.correct = [], []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Evaluate the patches of a batch of images.

        Args:
            inputs: one dict per image with "masks" (P, M, M), "labels" (P,), and "in_mask_loss" and "in_score_loss", (P,) bool: whether the
                patch contributes to the loss of masks and of scores.
            outputs: one dict per image with the logits "scores" (P,) and "masks" (P, M, M).
        """
        for patches, output in zip(inputs, outputs):
            masks, scores = output["masks"].cpu(), output["scores"].cpu()
            with_mask = patches["in_mask_loss"]
            self.ious.append(mask_iou(masks[with_mask], patches["masks"][with_mask]))
            self.correct.append(((scores > 0) == (patches["labels"] > 0))[patches["in_score_loss"]])

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Compute the figures over all patches.

        Returns:
            {"patches": {"mean IoU", "median IoU", "IoU>0.5", "IoU>0.7", "score accuracy"}} in percent; nan without patches.
            "IoU>0.5" is the share of masks whose IoU exceeds 0.5. The result is empty in all processes except the main process.
        """
        if self.distributed:
            comm.synchronize()
            gathered = comm.gather((self.ious, self.correct))
            if not comm.is_main_process():
                return OrderedDict()
            ious, correct = (list(itertools.chain.from_iterable(parts)) for parts in zip(*gathered))
        else:
            ious, correct = self.ious, self.correct
        ious = torch.cat(ious) if ious else torch.zeros(0)
        correct = torch.cat(correct).float() if correct else torch.zeros(0)
        # `torch.median` returns the lower of two middle values; the median is their mean.
        median = ious.quantile(0.5) if len(ious) else torch.tensor(float("nan"))
        results = {
            "mean IoU": ious.mean(),
            "median IoU": median,
            "IoU>0.5": (ious > 0.5).float().mean(),
            "IoU>0.7": (ious > 0.7).float().mean(),
            "score accuracy": correct.mean(),
        }
        return OrderedDict(patches={name: 100 * value.item() for name, value in results.items()})
