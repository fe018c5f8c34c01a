"""Precomputed proposals with their masks, for detectors: loading them, and mapping them with the images.

Shape letters: N proposals of an image, H W image, M side of the mask grid.
"""

import logging
import os
import pickle
from typing import Optional

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util
from torchvision.ops import roi_align

from ..errors import UserError
from ..io.proposal_files import count_rles, split_rles
from ..structures import WindowMasks
from ..structures.coco_masks import MaskError, check_masks
from .resumable import ResumableLoader, build_resumable_train_loader

MASK_SIDE = 56

# Pixels of bitmaps decoded at once: what a CPU's cache holds.
_CHUNK = 2**21

_COMPUTE = "compute it for this dataset with tools/compute_proposals.py --pkl"


class ProposalMapper(DatasetMapper):
    """Detectron2's mapper, whose precomputed proposals also have `proposal_masks`, in the frame of the transformed image."""

    @configurable
    def __init__(self, is_train: bool, *, masks: bool, **kwargs):
        """
        Args:
            is_train: as Detectron2's mapper has it.
            masks: give masks; by default not in training, where no RoI head reads them.
            kwargs: of Detectron2's mapper.
        """
        super().__init__(is_train, **kwargs)
        self.masks = masks
        self.augmentations = _Remembering(self.augmentations.augs)

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        if cfg.INPUT.CROP.ENABLED and is_train:
            raise UserError("INPUT.CROP does not go with precomputed proposals: set INPUT.CROP.ENABLED False")
        return {**super().from_config(cfg, is_train), "masks": not is_train}

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: Detectron2's format, with the proposals of `load_proposals_into_dataset` and the masks of
                `load_proposal_masks`.

        Returns:
            what Detectron2's mapper returns; where there are masks and they are asked for, proposals has the field proposal_masks
            (WindowMasks).

        Raises:
            ValueError: a transform that masks cannot follow; the message names it.
        """
        dataset_dict = dict(dataset_dict)
        joined = dataset_dict.pop("proposal_masks", None)
        if not self.masks or joined is None:
            return super().__call__(dataset_dict)
        logits = dataset_dict["proposal_objectness_logits"]
        # Detectron2 drops proposals and does not say which: numbered instead of scored, they tell.
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


class _Remembering(T.AugmentationList):
    """Keeps the transforms of the last image, which Detectron2's mapper does not hand out."""

    def __call__(self, aug_input):
        self.last = super().__call__(aug_input)
        return self.last


def transform_masks(masks: WindowMasks, transforms: T.TransformList) -> WindowMasks:
    """The same masks in the frame of the transformed image.

    Raises:
        ValueError: a transform that masks cannot follow; the message names it.
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
                f"masks of proposals cannot follow {type(transform).__name__}: use resizing and horizontal flips "
                "alone, or map without masks"
            )
    return masks


def sample_masks(rles: list, image_size: tuple, *, side: int = MASK_SIDE) -> WindowMasks:
    """Masks as grids over their tight boxes; pasted, they are the masks again but for detail finer than a grid cell.

    Args:
        rles: N compressed COCO RLEs.
        image_size: (H, W), their size.
        side: M.

    Returns:
        WindowMasks with float16 logits in -1 .. 1, linear in how much of a cell is foreground, and threshold 0.
    """
    height, width = image_size
    logits = torch.empty(len(rles), side, side, dtype=torch.float16)
    boxes = torch.from_numpy(mask_util.toBbox(rles).reshape(-1, 4)).float() if rles else torch.zeros(0, 4)
    boxes[:, 2:] += boxes[:, :2]
    chunk = max(1, _CHUNK // (height * width))
    # Used again for every chunk: fresh memory of this size would cost more than all the rest.
    bitmaps = torch.empty(min(chunk, len(rles)), 1, width, height)
    for start in range(0, len(rles), chunk):
        decoded = mask_util.decode(rles[start : start + chunk])
        count = decoded.shape[2]
        # pycocotools' order in memory is mask, column, row: so are x and y swapped until the end.
        bitmaps[:count, 0].copy_(torch.from_numpy(decoded).permute(2, 1, 0))
        regions = torch.cat([torch.arange(count)[:, None], boxes[start : start + count, [1, 0, 3, 2]]], dim=1)
        covered = roi_align(bitmaps[:count], regions, side, aligned=True)[:, 0]
        logits[start : start + count] = (2 * covered - 1).transpose(1, 2)
    return WindowMasks(logits, boxes, (height, width), threshold=0.0)


def load_proposal_masks(dataset_dicts: list, proposal_file: str) -> list:
    """Give dataset dicts, in place, the masks of the proposals that Detectron2's `load_proposals_into_dataset` gave them.

    Args:
        dataset_dicts: of the dataset that the file belongs to; ids are compared as text, as Detectron2 does.
        proposal_file: pickle of `proposal_files.write_pickle`. Without masks in it, nothing is done but a line logged.

    Returns:
        dataset_dicts, each with `proposal_masks`: `proposal_files.join_rles` of the image, not decoded, and `order` (N,), the place of
        each proposal in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not such a pickle, lacks an image, has boxes, scores and masks of different number, masks that are broken,
            or of another size than the image.
    """
    content, rows = _read(proposal_file)
    if "masks" not in content:
        logging.getLogger(__name__).info(
            f"{proposal_file} has no masks, which --pkl-masks would give it: neither will its detections"
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
                    f"{proposal_file}: the masks of image {image_id} are of size {size} (height, width), the image of "
                    f"{image_size}: is it the file of another dataset? {_COMPUTE}"
                )
        try:
            check_masks(split_rles(joined), [None] * counts["masks"])
        except MaskError as error:
            raise UserError(
                f"{proposal_file}: mask {error.index} of image {image_id} {error}: {_COMPUTE} again"
            ) from None
        # The same sort as Detectron2's, so that equal scores come in the same order.
        record["proposal_masks"] = {**joined, "order": scores.argsort()[::-1]}
    return dataset_dicts


def get_proposal_dicts(
    names: list, proposal_files: list, *, filter_empty: bool = True, min_keypoints: int = 0, masks: bool = False
) -> list:
    """Detectron2's `get_detection_dataset_dicts` with proposals, and errors that say what is wrong with a file.

    Args:
        names: of registered datasets.
        proposal_files: one pickle each.
        filter_empty, min_keypoints: as Detectron2 has them.
        masks: load masks, too; of one dataset only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another number of files than of datasets, or see `load_proposal_masks`.
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


def build_proposal_train_loader(cfg) -> ResumableLoader:
    """A training loader of full images with precomputed proposals, with `ProposalMapper`."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    # Before the datasets are read: it may refuse the config.
    mapper = ProposalMapper(cfg, True)
    dicts = get_proposal_dicts(
        list(cfg.DATASETS.TRAIN),
        list(cfg.DATASETS.PROPOSAL_FILES_TRAIN),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
    )
    return build_resumable_train_loader(cfg, mapper=mapper, dataset=dicts)


def build_proposal_test_loader(cfg, dataset_name: str):
    """Detectron2's test loader of precomputed proposals, with their masks."""
    dicts = get_proposal_dicts([dataset_name], [find_test_file(cfg, dataset_name)], filter_empty=False, masks=True)
    return build_detection_test_loader(dicts, mapper=ProposalMapper(cfg, False), num_workers=cfg.DATALOADER.NUM_WORKERS)


def find_test_file(cfg, dataset_name: str) -> str:
    """The file of DATASETS.PROPOSAL_FILES_TEST that belongs to a dataset of DATASETS.TEST.

    Raises:
        ValueError: there is none.
    """
    number, files = list(cfg.DATASETS.TEST).index(dataset_name), cfg.DATASETS.PROPOSAL_FILES_TEST
    if number >= len(files):
        raise UserError(f"DATASETS.PROPOSAL_FILES_TEST has no file for {dataset_name}: {_COMPUTE}")
    return files[number]


def _check_exists(path: str) -> None:
    if not os.path.isfile(PathManager.get_local_path(path)):
        raise FileNotFoundError(f"there is no proposal file {path}: {_COMPUTE}")


def _read(path: str) -> tuple:
    """What a pickle holds, with the keys of today; and which row an image id (as text) has."""
    _check_exists(path)
    with PathManager.open(path, "rb") as file:
        content: Optional[dict] = pickle.load(file, encoding="latin1")
    if isinstance(content, dict):
        for old, new in (("indexes", "ids"), ("scores", "objectness_logits")):
            if old in content:
                content[new] = content.pop(old)
    for key in ("ids", "boxes", "objectness_logits"):
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path} is no proposal file, it has no {key}: {_COMPUTE}")
    return content, {str(image_id): row for row, image_id in enumerate(content["ids"])}


def _check_ids(dataset_dicts: list, rows: dict, path: str) -> None:
    missing = [record["image_id"] for record in dataset_dicts if str(record["image_id"]) not in rows]
    if missing:
        raise UserError(
            f"{path} has no image {missing[0]}, nor {len(missing) - 1} others of the dataset's {len(dataset_dicts)}: "
            f"{_COMPUTE}"
        )
