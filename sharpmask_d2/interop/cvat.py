"""Masks of whole images in CVAT: the function of `cvat-cli task auto-annotate`.

    cvat-cli task auto-annotate 137 --function-module sharpmask_d2.interop.cvat -p label=str:thing -p keep=int:20

It needs cvat-sdk: `pip install 'sharpmask_d2[interop]'`.
"""

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from PIL.Image import Image

from .. import model_zoo
from ..extras import INTEROP, import_extra
from ..inference import SharpMaskAutomaticMaskGenerator
from ..inference.configuration import build_config
from ..structures.tight_masks import TightMask
from .cvat_files import mask_points, polygon_points
from .labelled_images import DEFAULT_LABEL


class CvatDetection:
    """CVAT's detection function: the clean masks of an image, all with one label."""

    def __init__(self, *, generator: SharpMaskAutomaticMaskGenerator, label: str, keep: Optional[int]):
        """
        Args:
            generator: makes the masks, in the output mode "coco_rle".
            label: name of the label of all masks.
            keep: maximum number of masks per image, those of highest predicted IoU; None keeps all.

        Raises:
            UserError: cvat-sdk is not installed.
        """
        self._cvat = import_extra("cvat_sdk.auto_annotation", requirement=INTEROP)
        self._generator, self._keep = generator, keep
        self._default = generator.pred_iou_thresh
        self.spec = self._cvat.DetectionFunctionSpec(labels=[self._cvat.label_spec(label, 0, type="mask")])

    def detect(self, context: Any, image: Image) -> Sequence[Any]:
        """The masks of an image.

        Args:
            context: of CVAT. Its conf_threshold is the lowest predicted IoU of a mask; None takes the generator's. If its
                conv_mask_to_poly is true, masks become polygons: one for each part, in a group, without holes.
            image: the image.

        Returns:
            CVAT's shapes, from the lowest predicted IoU to the highest, so that CVAT draws the best masks above others.
        """
        pixels = np.asarray(image.convert("RGB"))
        threshold = context.conf_threshold
        self._generator.pred_iou_thresh = self._default if threshold is None else threshold
        records = self._generator.generate(pixels, "RGB")
        shapes = []
        for number, record in reversed(list(enumerate(records[: self._keep], start=1))):
            mask = TightMask.from_rle(record["segmentation"])
            if context.conv_mask_to_poly:
                parts = polygon_points(mask)
                group = {"group": number} if len(parts) > 1 else {}
                shapes += [self._cvat.polygon(0, points, **group) for points in parts]
            else:
                shapes.append(self._cvat.mask(0, mask_points(mask)))
        return shapes


def create(
    *,
    model: str = model_zoo.DEFAULT,
    config_file: Optional[str] = None,
    weights: Optional[str] = None,
    device: Optional[str] = None,
    label: str = DEFAULT_LABEL,
    keep: Optional[int] = None,
    min_score: Optional[float] = None,
) -> CvatDetection:
    """Makes the function; cvat-cli calls it with the options `-p NAME=TYPE:VALUE`.

    Args:
        model: name of a packaged model on a feature pyramid; read only without `config_file`. Default: `model_zoo.DEFAULT`.
        config_file, weights: config and checkpoint of another model; None by default.
        device: of torch, such as "cuda". None, the default, takes CUDA where it is available.
        label: name of the label of all masks, which has to be a label of the task. Default: "object".
        keep: maximum number of masks per image; None, the default, keeps all.
        min_score: lowest predicted IoU of a mask, in 0..1. None, the default, takes that of `SharpMaskAutomaticMaskGenerator`.

    Raises:
        UserError: cvat-sdk is not installed, or an argument is not valid.
    """
    opts = () if device is None else ("MODEL.DEVICE", device)
    cfg = build_config(model, config_file=config_file, weights=weights, opts=opts)
    options: dict[str, Any] = {} if min_score is None else {"pred_iou_thresh": min_score}
    generator = SharpMaskAutomaticMaskGenerator(cfg, output_mode="coco_rle", **options)
    return CvatDetection(generator=generator, label=label, keep=keep)
