"""A machine learning backend for Label Studio: masks of whole images, and of clicks and boxes with smart tools.

The file model.py of a backend that `label-studio-ml` starts holds the line

    from sharpmask_d2.interop.label_studio_backend import SharpMaskBackend

It needs label_studio_ml: `pip install label-studio-ml`, or its current release from git.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from .. import model_zoo
from ..data.images import read_image
from ..errors import UserError
from ..extras import import_extra
from ..inference import ProposalPredictor, SharpMaskAutomaticMaskGenerator, SharpMaskPredictor
from ..inference.configuration import build_config
from .label_studio import KINDS, label_studio_results, prediction
from .labelled_images import DEFAULT_LABEL, LabelledImage, LabelledMask

_LabelStudioMLBase: Any = import_extra("label_studio_ml.model", requirement="label-studio-ml").LabelStudioMLBase


class _Control(NamedTuple):
    """A tag of the labelling interface that takes masks, polygons or boxes."""

    shape: str
    from_name: str
    to_name: str
    key: str  # of the image in the data of a task
    labels: list[str]


class SharpMaskBackend(_LabelStudioMLBase):
    """Answers Label Studio's requests for predictions; a subclass changes the settings.

    Attributes:
        model: name of a packaged model on a feature pyramid; read only without `config_file`.
        config_file, weights: config and checkpoint of another model; None by default.
        device: of torch, such as "cuda"; None, the default, takes CUDA where it is available.
        keep: maximum number of masks per image; None, the default, keeps all.
        min_score: lowest predicted IoU of a mask, in 0..1. None, the default, takes that of `SharpMaskAutomaticMaskGenerator`.
    """

    model: str = model_zoo.DEFAULT
    config_file: Optional[str] = None
    weights: Optional[str] = None
    device: Optional[str] = None
    keep: Optional[int] = None
    min_score: Optional[float] = None

    def predict(
        self, tasks: list[dict[str, Any]], context: Optional[dict[str, Any]] = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """The predictions of tasks.

        Args:
            tasks: of Label Studio.
            context: of a smart tool: its result holds keypoints (is_positive 0 is a point on the background) or a rectangle. None or
                an empty result asks for the masks of the whole image.
            kwargs: further entries of Label Studio's request, not read.

        Returns:
            One prediction per task. Its results are brushes if the labelling interface has BrushLabels, else polygons for PolygonLabels,
            else boxes for RectangleLabels. A mask of the whole image has the label "object", or the first label if there is none of this
            name; the mask of a prompt has the label of the prompt.

        Raises:
            UserError: the labelling interface has no such tag, an image cannot be read, or the model takes no prompts.
        """
        control = _control(self.parsed_label_config)
        predictor = _load(self.model, self.config_file, self.weights, self.device)
        prompts = (context or {}).get("result") or []
        predictions = []
        for task in tasks:
            pixels = read_image(Path(self.get_local_path(task["data"][control.key])))
            if prompts:
                label = _prompted_label(prompts) or control.labels[0]
                masks = _prompted_masks(predictor, pixels, prompts)
            else:
                label = DEFAULT_LABEL if DEFAULT_LABEL in control.labels else control.labels[0]
                masks = self._all_masks(predictor, pixels)
            image = LabelledImage(task.get("id", 0), str(task["data"][control.key]), pixels.shape[:2], masks)
            names = {"from_name": control.from_name, "to_name": control.to_name}
            predictions.append(prediction(label_studio_results(image, {1: label}, shape=control.shape, **names)))
        return predictions

    def _all_masks(self, predictor: ProposalPredictor, pixels: np.ndarray) -> list[LabelledMask]:
        options: dict[str, Any] = {} if self.min_score is None else {"pred_iou_thresh": self.min_score}
        generator = SharpMaskAutomaticMaskGenerator(predictor, output_mode="coco_rle", **options)
        records = generator.generate(pixels)[: self.keep]
        return [LabelledMask(record["segmentation"], 1, record["predicted_iou"]) for record in records]


@functools.lru_cache(maxsize=1)
def _load(model: str, config_file: Optional[str], weights: Optional[str], device: Optional[str]) -> ProposalPredictor:
    """The model, loaded once: Label Studio makes a backend for every request."""
    opts = () if device is None else ("MODEL.DEVICE", device)
    return ProposalPredictor(build_config(model, config_file=config_file, weights=weights, opts=opts))


def _control(interface: dict[str, Any]) -> _Control:
    for shape, (_, tag) in KINDS.items():
        for from_name, control in interface.items():
            if control["type"] == tag and control["labels"] and control["inputs"][0]["type"] == "Image":
                key = control["inputs"][0]["value"]
                return _Control(shape, from_name, control["to_name"][0], key, list(control["labels"]))
    tags = ", ".join(tag for _, tag in KINDS.values())
    raise UserError(f"the labelling interface has none of the tags {tags} with labels for an Image: add one")


def _prompted_label(prompts: list[dict[str, Any]]) -> Optional[str]:
    """The label of the first prompt that has one."""
    return next((names[0] for prompt in prompts if (names := prompt["value"].get(prompt["type"]))), None)


def _prompted_masks(
    predictor: ProposalPredictor, pixels: np.ndarray, prompts: list[dict[str, Any]]
) -> list[LabelledMask]:
    """The mask of the points and the box of a smart tool, or none where nothing was found."""
    height, width = pixels.shape[:2]
    points, labels, box = [], [], None
    for prompt in prompts:
        value = prompt["value"]
        x, y = value["x"] * width / 100, value["y"] * height / 100
        if prompt["type"].startswith("keypoint"):
            points.append([min(max(x, 0.0), width), min(max(y, 0.0), height)])
            labels.append(int(bool(prompt.get("is_positive", True))))
        elif prompt["type"].startswith("rectangle"):
            box = [x, y, x + value["width"] * width / 100, y + value["height"] * height / 100]
    if box is None and not any(labels):
        return []
    encoded = SharpMaskPredictor(predictor)
    encoded.set_image(pixels)
    found = encoded.predict_masks(points or None, labels or None, box, multimask_output=False)
    if not found.masks.nonempty().all():
        return []
    return [LabelledMask(found.masks.rle()[0], 1, float(found.scores))]
