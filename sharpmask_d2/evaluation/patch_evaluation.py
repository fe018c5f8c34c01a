"""How good masks and scores of patches are, as the released code evaluates them."""

import itertools
from collections import OrderedDict

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..modeling.losses import mask_iou


class PatchEvaluator(DatasetEvaluator):
    """Mean and median IoU of the masks of positives at probability 0.5, share above 0.5 and 0.7, and accuracy of the scores.

    Reads what `SharpMaskProposalNetwork` returns for patches.
    """

    def __init__(self, *, distributed: bool = True):
        """
        Args:
            distributed: collect the results of all processes.
        """
        self.distributed = distributed
        self.reset()

    def reset(self):
        self.ious, self.correct = [], []

    def process(self, inputs: list, outputs: list):
        """
        Args:
            inputs: dicts with masks (P, M, M), labels, pays_mask and pays_score (P,).
            outputs: dicts with scores (P,) and masks (P, M, M), logits.
        """
        for patches, output in zip(inputs, outputs):
            masks, scores = output["masks"].cpu(), output["scores"].cpu()
            paying = patches["pays_mask"]
            self.ious.append(mask_iou(masks[paying], patches["masks"][paying]))
            self.correct.append(((scores > 0) == (patches["labels"] > 0))[patches["pays_score"]])

    def evaluate(self):
        """
        Returns:
            {"patches": {"mean IoU", "median IoU", "IoU>0.5", "IoU>0.7", "score accuracy"}} in percent, NaN where there was no patch.
        """
        if self.distributed:
            comm.synchronize()
            gathered = comm.gather((self.ious, self.correct))
            if not comm.is_main_process():
                return {}
            ious, correct = (list(itertools.chain.from_iterable(parts)) for parts in zip(*gathered))
        else:
            ious, correct = self.ious, self.correct
        ious = torch.cat(ious) if ious else torch.zeros(0)
        correct = torch.cat(correct).float() if correct else torch.zeros(0)
        # torch.median takes the lower of two middle values.
        median = ious.quantile(0.5) if len(ious) else torch.tensor(float("nan"))
        results = {
            "mean IoU": ious.mean(),
            "median IoU": median,
            "IoU>0.5": (ious > 0.5).float().mean(),
            "IoU>0.7": (ious > 0.7).float().mean(),
            "score accuracy": correct.mean(),
        }
        return OrderedDict(patches={name: 100 * value.item() for name, value in results.items()})
