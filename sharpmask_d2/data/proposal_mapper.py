"""Loads precomputed proposals with their masks for detectors, and maps them together with the images.

Shape letters: N proposals of an image, H W image, M side of the mask grid.
"""

import logging
import os
import pickle
from typing import Any, Optional

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util
from torch.utils.data import DataLoader
from torchvision.ops import roi_align

from ..errors import UserError
from ..io.proposal_files import count_rles, split_rles
from ..structures import WindowMasks
from ..structures.coco_masks import MaskError, check_masks
from .resumable import ResumableLoader, build_resumable_train_loader

# Default side of the grids in which masks of proposals are sampled.
MASK_SIDE = 56

# Pixels of bitmaps decoded at a time, so that they fit a CPU's cache.
_CHUNK = 2**21

_COMPUTE = "compute it for this dataset with tools/compute_proposals.py --pkl"


class ProposalMapper(DatasetMapper):
    """Detectron2's mapper, with `proposal_masks` of the precomputed proposals in the frame of the transformed image."""

    @configurable
    def __init__(self, is_train: bool, *, masks: bool, **kwargs: Any):
        """
        Args:
            is_train: whether the images are for training, as for Detectron2's mapper.
            masks: add `proposal_masks`. From a config this is False in training, where no RoI head reads them.
            kwargs: further arguments of Detectron2's mapper.
        """
        super().__init__(is_train, **kwargs)
        self.masks = masks
        self.augmentations = _RecordingAugmentations(self.augmentations.augs)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        if cfg.INPUT.CROP.ENABLED and is_train:
            raise UserError("INPUT.CROP cannot be used with precomputed proposals: set INPUT.CROP.ENABLED False")
        return {**super().from_config(cfg, is_train), "masks": not is_train}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map an image with its proposals.

        Args:
            dataset_dict: in Detectron2's format, with proposals from `load_proposals_into_dataset` and masks from `load_proposal_masks`.

        Returns:
            The dict of Detectron2's mapper. If masks are wanted and available, `proposals` has the field proposal_masks (WindowMasks in
            the frame of the transformed image).

        Raises:
            UserError: masks cannot follow a transform; the message names it.
        """
        dataset_dict = dict(dataset_dict)
        joined = dataset_dict.pop("proposal_masks", None)
        if not self.masks or joined is None:
            return super().__call__(dataset_dict)
        logits = dataset_dict["proposal_objectness_logits"]
        # Detectron2 drops some proposals. With numbers instead of scores, the proposals that are kept can be identified.
        dataset_dict["proposal_objectness_logits"] = np.arange(len(logits))
        mapped = super().__call__(dataset_dict)
        proposals = mapped["proposals"]
        kept = proposals.objectness_logits.long()
        proposals.objectness_logits = torch.as_tensor(logits.astype("float32"))[kept]
        rles = split_rles(joined)
        rles = [rles[i] for i in joined["order"][kept.numpy()]]
        masks = sample_masks(rles, joined["size"] or (mapped["height"], mapped["width"]))
        proposals.proposal_masks = transform_masks(masks, self.augmentations.last)
        return mapped


class _RecordingAugmentations(T.AugmentationList):
    """Augmentations that record the transforms of the last image, which Detectron2's mapper does not return."""

    def __call__(self, aug_input: T.AugInput) -> T.TransformList:
        self.last = super().__call__(aug_input)
        return self.last


def transform_masks(masks: WindowMasks, transforms: T.TransformList) -> WindowMasks:
    """Masks in the frame of the transformed image.

    Args:
        masks: in the frame of the image.
        transforms: of the image.

    Raises:
        UserError: masks cannot follow a transform; the message names it.
    """
    for transform in transforms.transforms:
        if isinstance(transform, T.TransformList):
            masks = transform_masks(masks, transform)
        elif isinstance(transform, T.HFlipTransform):
            masks = masks.hflip()
        elif isinstance(transform, T.ResizeTransform):
            scale_x, scale_y = transform.new_w / transform.w, transform.new_h / transform.h
            masks = masks.scale(scale_x, scale_y, (transform.new_h, transform.new_w))
        elif not isinstance(transform, T.NoOpTransform):
            raise UserError(
                f"masks of proposals cannot follow {type(transform).__name__}: use only resizing and horizontal flips, "
                "or map without masks"
            )
    return masks


def sample_masks(rles: list[dict], image_size: tuple[int, int], *, side: int = MASK_SIDE) -> WindowMasks:
    """Sample masks in grids over their tight boxes. Pasted, they equal the masks except for details smaller than a grid cell.

    Args:
        rles: N compressed COCO RLEs.
        image_size: (H, W) in pixels, the size of the RLEs.
        side: M in cells; 56 by default.

    Returns:
        WindowMasks of threshold 0, whose logits (float16 in -1..1) are linear in the share of a cell that is foreground.
    """
    height, width = image_size
    logits = torch.empty(len(rles), side, side, dtype=torch.float16)
    boxes = torch.from_numpy(mask_util.toBbox(rles).reshape(-1, 4)).float() if rles else torch.zeros(0, 4)
    boxes[:, 2:] += boxes[:, :2]
    chunk = max(1, _CHUNK // (height * width))
    # Reused by every chunk: allocating memory of this size would take longer than all the rest.
    bitmaps = torch.empty(min(chunk, len(rles)), 1, width, height)
    for start in range(0, len(rles), chunk):
        decoded = mask_util.decode(rles[start : start + chunk])
        count = decoded.shape[2]
        # In memory, pycocotools' order is mask, column, row. Until the end, x and y are therefore swapped.
        bitmaps[:count, 0].copy_(torch.from_numpy(decoded).permute(2, 1, 0))
        regions = torch.cat([torch.arange(count)[:, None], boxes[start : start + count, [1, 0, 3, 2]]], dim=1)
        covered = roi_align(bitmaps[:count], regions, side, aligned=True)[:, 0]
        logits[start : start + count] = (2 * covered - 1).transpose(1, 2)
    return WindowMasks(logits, boxes, (height, width), threshold=0.0)


def load_proposal_masks(dataset_dicts: list[dict], proposal_file: str) -> list[dict]:
    """Add the masks of proposals, in place, to dataset dicts with proposals from Detectron2's `load_proposals_into_dataset`.

    Args:
        dataset_dicts: of the dataset to which the file belongs. As in Detectron2, ids are compared as text.
        proposal_file: path of a pickle from `proposal_files.write_pickle`. If it has no masks, this is logged and nothing is added.

    Returns:
        dataset_dicts. `proposal_masks` of each is the entry of `proposal_files.join_rles`, not decoded, with `order` (N,), the index of
        each proposal's mask in it.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: the file is not such a pickle, lacks an image, has different numbers of boxes, scores and masks for an image, or has
            masks that are not valid or of another size than the image.
    """
    content, rows = _read(proposal_file)
    if "masks" not in content:
        logging.getLogger(__name__).info(
            f"{proposal_file} has no masks, so its detections have none either: write it with --pkl-masks to add them"
        )
        return dataset_dicts
    _check_ids(dataset_dicts, rows, proposal_file)
    for record in dataset_dicts:
        image_id = record["image_id"]
        row = rows[str(image_id)]
        scores, joined = content["objectness_logits"][row], content["masks"][row]
        counts = {
            "boxes": len(content["boxes"][row]),
            "objectness_logits": len(scores),
            "masks": count_rles(joined),
        }
        if len(set(counts.values())) > 1:
            raise UserError(f"{proposal_file}: image {image_id}: different numbers of {counts}: {_COMPUTE} again")
        if counts["masks"]:
            size = tuple(joined["size"])
            image_size = record.get("height", size[0]), record.get("width", size[1])
            if size != image_size:
                raise UserError(
                    f"{proposal_file}: the masks of image {image_id} are of size {size} (height, width), but the image of "
                    f"{image_size}: does the file belong to another dataset? {_COMPUTE}"
                )
        try:
            check_masks(split_rles(joined), [None] * counts["masks"])
        except MaskError as error:
            raise UserError(
                f"{proposal_file}: mask {error.index} of image {image_id} {error}: {_COMPUTE} again"
            ) from None
        # Sorted as Detectron2 sorts them, so that equal scores have the same order.
        record["proposal_masks"] = {**joined, "order": scores.argsort()[::-1]}
    return dataset_dicts


def get_proposal_dicts(
    names: list[str],
    proposal_files: list[str],
    *,
    filter_empty: bool = True,
    min_keypoints: int = 0,
    masks: bool = False,
) -> list[dict]:
    """Detectron2's `get_detection_dataset_dicts` with proposals, and with errors that name the fault of a file.

    Args:
        names: of registered datasets.
        proposal_files: path of the pickle of each dataset.
        filter_empty: leave out images without annotations; True by default.
        min_keypoints: minimum number of keypoints of an image; 0 by default.
        masks: also load the masks, which is possible for a single dataset; False by default.

    Returns:
        Detectron2's dataset dicts.

    Raises:
        FileNotFoundError: a file does not exist.
        UserError: the numbers of files and datasets differ, or see `load_proposal_masks`.
    """
    if len(names) != len(proposal_files):
        raise UserError(
            f"DATASETS has {len(names)} datasets {tuple(names)} but {len(proposal_files)} proposal files "
            f"{tuple(proposal_files)}: PROPOSAL_FILES_TRAIN and PROPOSAL_FILES_TEST name one for each"
        )
    for path in proposal_files:
        _check_exists(path)
    try:
        dicts = get_detection_dataset_dicts(
            names, filter_empty=filter_empty, min_keypoints=min_keypoints, proposal_files=proposal_files
        )
    except KeyError:
        for name, path in zip(names, proposal_files):
            _check_ids(DatasetCatalog.get(name), _read(path)[1], path)
        raise
    return load_proposal_masks(dicts, proposal_files[0]) if masks else dicts


def build_proposal_train_loader(cfg: CfgNode) -> ResumableLoader:
    """Build a training loader of full images with precomputed proposals, which uses `ProposalMapper`."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    # The mapper may refuse the config, which is known before the datasets are read.
    mapper = ProposalMapper(cfg, True)
    dicts = get_proposal_dicts(
        list(cfg.DATASETS.TRAIN),
        list(cfg.DATASETS.PROPOSAL_FILES_TRAIN),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
    )
    return build_resumable_train_loader(cfg, mapper=mapper, dataset=dicts)


def build_proposal_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build Detectron2's test loader of a dataset with precomputed proposals and their masks."""
    dicts = get_proposal_dicts([dataset_name], [find_test_file(cfg, dataset_name)], filter_empty=False, masks=True)
    return build_detection_test_loader(dicts, mapper=ProposalMapper(cfg, False), num_workers=cfg.DATALOADER.NUM_WORKERS)


def find_test_file(cfg: CfgNode, dataset_name: str) -> str:
    """The file of DATASETS.PROPOSAL_FILES_TEST that belongs to a dataset of DATASETS.TEST.

    Args:
        cfg: the config.
        dataset_name: of the dataset.

    Raises:
        UserError: there is no such file.
    """
    number, files = list(cfg.DATASETS.TEST).index(dataset_name), cfg.DATASETS.PROPOSAL_FILES_TEST
    if number >= len(files):
        raise UserError(f"DATASETS.PROPOSAL_FILES_TEST has no file for {dataset_name}: {_COMPUTE}")
    return files[number]


def _check_exists(path: str) -> None:
    if not os.path.isfile(PathManager.get_local_path(path)):
        raise FileNotFoundError(f"there is no proposal file {path}: {_COMPUTE}")


def _read(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The content of a pickle, with the keys of current Detectron2, and the row of each image id (as text)."""
    _check_exists(path)
    with PathManager.open(path, "rb") as file:
        content: Optional[dict] = pickle.load(file, encoding="latin1")
    if isinstance(content, dict):
        for old, new in (("indexes", "ids"), ("scores", "objectness_logits")):
            if old in content:
                content[new] = content.pop(old)
    for key in ("ids", "boxes", "objectness_logits"):
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path} is not a proposal file, because it has no {key}: {_COMPUTE}")
    return content, {str(image_id): row for row, image_id in enumerate(content["ids"])}


def _check_ids(dataset_dicts: list[dict], rows: dict[str, int], path: str) -> None:
    missing = [record["image_id"] for record in dataset_dicts if str(record["image_id"]) not in rows]
    if missing:
        raise UserError(
            f"{path} has no image {missing[0]}, nor {len(missing) - 1} others of the dataset's {len(dataset_dicts)}: "
            f"{_COMPUTE}"
        )
