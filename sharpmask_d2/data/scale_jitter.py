"""Large-scale jitter for training on full images: random resizing, then a random square crop, which may extend beyond the image."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.utils import comm
from fvcore.transforms.transform import Transform

from ..errors import UserError
from .mixing import MixingSampler, epoch_counts, load_datasets
from .patch_mapper import PADDING_VALUE
from .resumable import ResumableLoader, build_resumable_train_loader

# Maximum number of crops that are drawn per image until one has an object.
_TRIES = 20


class CutTransform(Transform):
    """Cuts a rectangle, which may lie partly outside the image. Polygons are moved, but not clipped.

    Detectron2's cropping followed by its padding gives equal images, but clips polygons, for which it needs the library shapely.
    """

    def __init__(self, x0: int, y0: int, width: int, height: int, fill: float):
        """
        Args:
            x0, y0: upper left corner of the rectangle in pixels of the image; both may be negative.
            width, height: size of the rectangle in pixels.
            fill: value of pixels outside the image; segmentations are 0 there.
        """
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return self._cut(img, self.fill)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self._cut(segmentation, 0)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords - np.array([self.x0, self.y0], dtype=coords.dtype)

    def _cut(self, x: np.ndarray, fill: float) -> np.ndarray:
        inside = x[max(self.y0, 0) : max(self.y0 + self.height, 0), max(self.x0, 0) : max(self.x0 + self.width, 0)]
        cut = np.full((self.height, self.width, *x.shape[2:]), fill, dtype=x.dtype)
        top, left = max(-self.y0, 0), max(-self.x0, 0)
        cut[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return cut


class RandomCut(T.Augmentation):
    """Cuts a square of fixed size at a random position. An image that is smaller than the square is placed at a random position in it.

    Detectron2's FixedSizeCrop draws one number for both axes, so that all crops lie on a diagonal of the image. It places smaller images in
    the upper left corner.
    """

    def __init__(self, side: int, fill: float = PADDING_VALUE):
        """
        Args:
            side: side of the square in pixels.
            fill: value of pixels outside the image. Default: 127.5, as in the released code.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        y0, x0 = (round(self._rand_range() * (size - self.side)) for size in image.shape[:2])
        return CutTransform(x0, y0, self.side, self.side, self.fill)


def build_jitter_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Builds the augmentations for training on full images: resizing, `RandomCut`, flips and colours.

    Args:
        cfg: a config; INPUT.SCALE_JITTER and INPUT.RANDOM_FLIP are read. Any value of the latter but "horizontal" means no flips.

    Returns:
        Augmentations in the order in which they are applied.
    """
    jitter = cfg.INPUT.SCALE_JITTER
    augmentations = [
        T.ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, jitter.SIDE, jitter.SIDE),
        RandomCut(jitter.CROP),
    ]
    if cfg.INPUT.RANDOM_FLIP == "horizontal":
        augmentations.append(T.RandomFlip())
    if jitter.COLOR:
        span = 1 - jitter.COLOR, 1 + jitter.COLOR
        augmentations += [T.RandomBrightness(*span), T.RandomContrast(*span), T.RandomSaturation(*span)]
    return augmentations


class JitterMapper(DatasetMapper):
    """Detectron2's DatasetMapper, extended to images without objects and to datasets whose annotations are not exhaustive.

    If annotations are not exhaustive, `instances` has a field `gt_exhaustive`, which is False for every object. Only the surroundings of
    objects can then be used for training, so that the crop is drawn again, up to 20 times, until it has an object.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Reads an image and its objects, and applies the augmentations.

        Args:
            dataset_dict: an image in Detectron2's format. The entry `exhaustive` is False if some objects are not annotated; default: True.

        Returns:
            A dict with `image` (3, height, width) uint8 and `instances`, as Detectron2's DatasetMapper returns it.
        """
        if dataset_dict.get("exhaustive", True):
            return super().__call__(dataset_dict)
        for _ in range(_TRIES):
            mapped = super().__call__(dataset_dict)
            if len(mapped["instances"]):
                break
        mapped["instances"].gt_exhaustive = torch.zeros(len(mapped["instances"]), dtype=torch.bool)
        return mapped

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        if any(not annotation.get("iscrowd", 0) for annotation in dataset_dict["annotations"]):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        dataset_dict.pop("annotations")
        dataset_dict["instances"] = annotations_to_instances([], image_shape)


def build_jitter_train_loader(cfg: CfgNode) -> ResumableLoader:
    """Builds the training loader of full images with the augmentations of INPUT.SCALE_JITTER.

    With MODEL.MASK_ON, boxes are the tight boxes of the masks that remain in the crop.

    Args:
        cfg: a config; INPUT, DATASETS, DATALOADER, SOLVER.IMS_PER_BATCH, MODEL.MASK_ON and SEED are read.

    Raises:
        UserError: DATASETS.MAX_SHARES names a dataset that DATASETS.TRAIN does not have.
    """
    mapper = JitterMapper(
        is_train=True,
        augmentations=build_jitter_augmentations(cfg),
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format="bitmask",
        recompute_boxes=cfg.MODEL.MASK_ON,
    )
    dicts, sizes = load_datasets(cfg)
    sampler = None
    if cfg.DATASETS.MAX_SHARES:
        shares = dict(cfg.DATASETS.MAX_SHARES)
        if unknown := set(shares) - set(cfg.DATASETS.TRAIN):
            raise UserError(f"DATASETS.MAX_SHARES names {sorted(unknown)}, which DATASETS.TRAIN does not have")
        sampler = MixingSampler(
            sizes=sizes,
            counts=epoch_counts(sizes, [shares.get(name, 1.0) for name in cfg.DATASETS.TRAIN]),
            seed=comm.shared_random_seed() if cfg.SEED < 0 else cfg.SEED,
        )
    return build_resumable_train_loader(cfg, mapper=mapper, dataset=dicts, sampler=sampler)
