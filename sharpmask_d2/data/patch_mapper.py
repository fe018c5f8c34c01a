"""Cuts training patches and their targets out of images with objects.

Shape letters: H W height and width of an image in pixels, G objects, P patches of an image, S side of a patch (window and context) in
pixels, M side of a target mask in cells.
"""

from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances

from ..errors import UserError
from ..windows.labels import label_rule
from .images import ImageError, read_image
from .objects import ImageObjects, cut_region, large_enough, read_objects, render_mask
from .window_sampling import WindowSampler

# Pixel value outside the image, half of 255, as in the released code.
PADDING_VALUE = 127.5


class PatchMapper:
    """Reads an image once and cuts several patches out of it, with their targets.

    The result of a call depends only on the dataset dict and the random generator, so that training is reproducible.
    """

    @configurable
    def __init__(
        self,
        *,
        sampler: WindowSampler,
        window_size: int,
        context: int,
        mask_size: int,
        patches_per_image: int,
        image_format: str,
        flip: bool,
        min_area: float,
        min_side: float,
        category_weights: dict[int, float],
        color_jitter: float = 0.0,
    ):
        """
        Args:
            sampler: draws the windows and their labels.
            window_size: side of the window in pixels of the patch.
            context: number of pixels of context around the window, the sum over both sides.
            mask_size: M.
            patches_per_image: P.
            image_format: channel order of the patches, "RGB" or "BGR".
            flip: whether patches are mirrored left to right with a probability of 0.5.
            min_area: minimum area of a target in pixels of the image, see `objects.read_objects`.
            min_side: minimum length of the shorter side of the box of a target in pixels, see `objects.read_objects`.
            category_weights: category_id -> relative frequency with which each object of the category is drawn; 1 for categories that are
                not listed.
            color_jitter: strength of random brightness, contrast and saturation: factors are drawn from 1 - color_jitter to
                1 + color_jitter. Default: 0, no change, as in the released code.
        """
        self.sampler = sampler
        self.window_size, self.context, self.mask_size = window_size, context, mask_size
        self.patches_per_image = patches_per_image
        self.image_format = image_format
        self.flip = flip
        self.min_area, self.min_side = min_area, min_side
        self.category_weights = category_weights
        self.color_jitter = color_jitter

    @classmethod
    def from_config(cls, cfg: CfgNode, *, category_weights: dict[int, float], is_train: bool = True) -> dict[str, Any]:
        sharpmask = cfg.MODEL.SHARPMASK
        refined = sharpmask.REFINEMENT.NAME != "none"
        sampling = sharpmask.SAMPLING
        sampler = WindowSampler(
            window_size=sharpmask.WINDOW_SIZE,
            exponents=sharpmask.TEST.SCALES,
            mask_fraction=sampling.MASK_FRACTION if is_train else 0.5,
            shared_positives=sampling.SHARED_POSITIVES if is_train else True,
            near_negatives=sampling.NEAR_NEGATIVES,
            label_rule=label_rule(cfg),
        )
        return {
            "sampler": sampler,
            "window_size": sharpmask.WINDOW_SIZE,
            "context": sharpmask.CONTEXT,
            # As in the released code, DeepMask is trained at twice its resolution. Evaluation uses one cell per pixel of the window.
            "mask_size": sharpmask.WINDOW_SIZE if refined or not is_train else 2 * sharpmask.COARSE_MASK_SIZE,
            "patches_per_image": sampling.PATCHES_PER_IMAGE if is_train else sharpmask.TEST.PATCHES_PER_IMAGE,
            "image_format": cfg.INPUT.FORMAT,
            "flip": is_train,
            "min_area": sampling.MIN_AREA,
            "min_side": sampling.MIN_SIDE,
            "category_weights": category_weights,
            "color_jitter": sampling.COLOR_JITTER if is_train else 0.0,
        }

    def weights(self, objects: ImageObjects) -> np.ndarray:
        """Returns the relative frequency with which each object is drawn: (G,) float64, zero for objects that are no targets."""
        weights = np.array([self.category_weights.get(int(c), 1.0) for c in objects.categories], dtype=np.float64)
        return weights * objects.targets

    def objects(self, dataset_dict: dict[str, Any]) -> ImageObjects:
        """Reads the objects of a dataset dict, see `objects.read_objects`."""
        return read_objects(dataset_dict, min_area=self.min_area, min_side=self.min_side)

    def __call__(self, dataset_dict: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Reads an image and cuts patches out of it.

        Args:
            dataset_dict: an image of a dataset in Detectron2's format, see `objects.read_objects`.
            rng: source of all random numbers.

        Returns:
            A dict with `file_name`, `image_id` and the entries that `cut` returns.

        Raises:
            OSError: the image cannot be read; the message names the file.
            UserError: an annotation is broken, or the size of the image is not the size in the dataset.
        """
        name = dataset_dict["file_name"]
        try:
            image = read_image(name, format=self.image_format)
        except ImageError as error:
            raise OSError(f"cannot read image {dataset_dict.get('image_id')}, {name}: {error.reason}") from error
        expected = dataset_dict.get("height", image.shape[0]), dataset_dict.get("width", image.shape[1])
        if image.shape[:2] != expected:
            raise UserError(
                f"image {dataset_dict.get('image_id')}, {name}, has {image.shape[:2]} pixels (height, width), "
                f"but {expected} in the dataset"
            )
        samples = self.cut(image, self.objects(dataset_dict), rng)
        return {"file_name": name, "image_id": dataset_dict.get("image_id"), **samples}

    def cut(self, image: np.ndarray, objects: ImageObjects, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Draws windows and cuts patches out of an image.

        Args:
            image: (H, W, 3) uint8.
            objects: in the frame of the image.
            rng: source of all random numbers.

        Returns:
            A dict with
            patches: (P, 3, S, S) uint8.
            masks: (P, M, M) uint8 in {0, 1}, zero for negative windows.
            labels: (P,) int64, 1 for positive and 0 for negative windows.
            in_mask_loss, in_score_loss: (P,) bool, whether the patch contributes to the mask loss and to the score loss.
        """
        size = self.window_size + self.context
        if self.color_jitter:
            image = _jitter_colors(image, self.color_jitter, rng)
        samples = self.sampler(objects, self.weights(objects), image.shape[:2], self.patches_per_image, rng)
        count = len(samples.windows)
        patches = np.empty((count, size, size, 3), dtype=np.uint8)
        masks = np.zeros((count, self.mask_size, self.mask_size), dtype=np.uint8)
        flips = rng.random(count) < (0.5 if self.flip else 0.0)
        for i, (window, owner) in enumerate(zip(samples.windows, samples.objects)):
            patch_side = (window[2] - window[0]) * size / self.window_size
            # Regions are rounded to whole pixels, so that cutting is a slice; the mask is cut from the rounded region.
            side = max(1, round(patch_side))
            x0, y0 = (round((low + high) / 2 - side / 2) for low, high in (window[0::2], window[1::2]))
            patch = cut_region(image, (x0, y0, side), size, PADDING_VALUE)
            border = side * self.context / 2 / size
            patches[i] = patch[:, ::-1] if flips[i] else patch
            if owner >= 0:
                region = (x0 + border, y0 + border, side - 2 * border)
                mask = render_mask(objects.segmentations[owner], region, self.mask_size)
                masks[i] = mask[:, ::-1] if flips[i] else mask
        return {
            "patches": torch.from_numpy(np.ascontiguousarray(patches.transpose(0, 3, 1, 2))),
            "masks": torch.from_numpy(masks),
            "labels": torch.from_numpy(samples.labels),
            "in_mask_loss": torch.from_numpy(samples.in_mask_loss),
            "in_score_loss": torch.from_numpy(samples.in_score_loss),
        }

    def cut_instances(
        self, image: torch.Tensor, instances: Instances, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Cuts patches out of an image that Detectron2's own mapper has read.

        Args:
            image: (3, H, W) in 0..255.
            instances: objects in the frame of the image, with gt_boxes, gt_classes and gt_masks (polygons or bitmaps).
            rng: source of all random numbers.

        Returns:
            A dict, see `cut`.

        Raises:
            UserError: the instances have no masks.
        """
        # Detectron2's mapper omits the field if an image has no object.
        if len(instances) and not instances.has("gt_masks"):
            raise UserError(
                "training images come without masks: set MODEL.MASK_ON True, so that Detectron2's mapper loads them"
            )
        boxes = instances.gt_boxes.tensor.cpu().numpy()
        masks = instances.gt_masks if len(instances) else None
        if masks is None:
            segmentations = []
        else:
            segmentations = masks.polygons if hasattr(masks, "polygons") else list(masks.tensor.cpu().numpy())
        objects = ImageObjects(
            boxes=boxes,
            segmentations=segmentations,
            categories=instances.gt_classes.cpu().numpy(),
            targets=large_enough(boxes, segmentations, min_area=self.min_area, min_side=self.min_side),
            crowd_boxes=np.zeros((0, 4), np.float32),
        )
        return self.cut(image.permute(1, 2, 0).cpu().numpy().round().astype(np.uint8), objects, rng)


def _jitter_colors(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Changes saturation, contrast and brightness, each by a random factor from 1 - strength to 1 + strength.

    The transforms of Detectron2 need three passes in floating point, which take nearly three times as long, and draw from the global random
    generator of numpy instead of `rng`.
    """
    saturation, contrast, brightness = rng.uniform(1 - strength, 1 + strength, 3)
    grey = image.mean(axis=2, dtype=np.float32)
    mean = float(grey.mean())
    grey = cv2.merge([grey.astype(np.uint8)] * 3)
    # Changing the saturation mixes the image with grey; contrast and brightness are one affine map of the mixture.
    factor = contrast * brightness
    return cv2.addWeighted(
        image, saturation * factor, grey, (1 - saturation) * factor, brightness * mean * (1 - contrast)
    )
