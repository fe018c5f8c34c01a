"""Masks of clicks and boxes in CVAT: an interaction function for an agent of CVAT.

    cvat-cli function create-native SharpMask --function-module sharpmask_d2.interop.cvat_interaction
    cvat-cli function run-agent 12 --function-module sharpmask_d2.interop.cvat_interaction

It needs a release of cvat-sdk that has interaction functions: `pip install 'sharpmask_d2[interop]'`.
"""

from typing import Any, Optional

import numpy as np
from PIL.Image import Image

from .. import model_zoo
from ..errors import UserError
from ..extras import INTEROP, import_extra
from ..inference import ProposalPredictor, SharpMaskPredictor
from ..inference.configuration import build_config
from .cvat_files import mask_points


class CvatInteraction:
    """CVAT's interaction function: the mask of points on and off an object, of a box around it, or of both."""

    def __init__(self, predictor: ProposalPredictor):
        """
        Args:
            predictor: of a model on a feature pyramid; it is shared by all images.

        Raises:
            UserError: cvat-sdk is not installed, or has no interaction functions; or see `SharpMaskPredictor`.
        """
        self._cvat = import_extra("cvat_sdk.auto_annotation", requirement=INTEROP)
        if not hasattr(self._cvat, "InteractionFunctionSpec"):
            raise UserError(f"cvat_sdk has no interaction functions: run pip install -U '{INTEROP}'")
        self._models = import_extra("cvat_sdk.models", requirement=INTEROP)
        # A model whose masks cannot be prompted is refused now, not at the first image.
        SharpMaskPredictor(predictor)
        self._predictor = predictor
        self.spec = self._cvat.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=0)

    def preprocess_image(self, context: Any, image: Image) -> SharpMaskPredictor:
        """Encodes an image once for all of its prompts.

        Args:
            context: of CVAT, not read.
            image: the image.
        """
        encoded = SharpMaskPredictor(self._predictor)
        encoded.set_image(np.asarray(image.convert("RGB")), "RGB")
        return encoded

    def detect(self, context: Any, pp_image: SharpMaskPredictor, prompts: Any) -> list[Any]:
        """The mask of a prompt.

        Args:
            context: of CVAT, not read.
            pp_image: from `preprocess_image`.
            prompts: pos_points, neg_points and bounding_box in pixels of the image. Points outside of the image are moved to its edge.

        Returns:
            One shape of type "mask" with its confidence; none where nothing was found, or where the prompt has neither a point on the
            object nor a box.
        """
        if not prompts.pos_points and prompts.bounding_box is None:
            return []
        height, width = pp_image.image_size
        points = np.array([*prompts.pos_points, *prompts.neg_points], dtype=np.float64).reshape(-1, 2)
        labels = [1] * len(prompts.pos_points) + [0] * len(prompts.neg_points)
        box = None
        if prompts.bounding_box is not None:
            corners = np.array(prompts.bounding_box, dtype=np.float64)
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
        found = pp_image.predict_masks(
            points.clip(0, (width, height)) if len(points) else None,
            labels if len(points) else None,
            box,
            multimask_output=False,
        )
        (mask,) = found.masks.tight_masks()
        if not mask.bitmap.size:
            return []
        confidence = self._models.AttributeValRequest(
            spec_id=int(self._cvat.InteractionResultAttributes.CONFIDENCE), value=f"{found.scores.item():.3f}"
        )
        shape = self._cvat.InteractionResultShape(type="mask", points=mask_points(mask), attributes=[confidence])
        return [shape]


def create(
    *,
    model: str = model_zoo.DEFAULT,
    config_file: Optional[str] = None,
    weights: Optional[str] = None,
    device: Optional[str] = None,
) -> CvatInteraction:
    """Makes the function; cvat-cli calls it with the options `-p NAME=TYPE:VALUE`.

    Args:
        model, config_file, weights, device: see `cvat.create`.

    Raises:
        UserError: see `CvatInteraction`, or an argument is not valid.
    """
    opts = () if device is None else ("MODEL.DEVICE", device)
    cfg = build_config(model, config_file=config_file, weights=weights, opts=opts)
    return CvatInteraction(ProposalPredictor(cfg))
