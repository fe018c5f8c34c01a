"""Detectron2's box predictor, whose losses do not depend on how many processes share a batch."""

from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor

from ..losses import part_of_mean


class SharedOutputLayers(FastRCNNOutputLayers):
    """Detectron2's `FastRCNNOutputLayers`, with equal parameter names, whose losses are means over the RoIs of all processes."""

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """Compute Detectron2's losses of classes and boxes as means over the RoIs of all processes, as in `modeling.losses`.

        Args:
            predictions: result of `forward`.
            proposals: sampled RoIs, one `Instances` per image.

        Returns:
            The scalar losses "loss_cls" and "loss_box_reg", multiplied by their weights.
        """
        part = part_of_mean(sum(map(len, proposals)), predictions[0].device)
        return {name: loss * part for name, loss in super().losses(predictions, proposals).items()}
