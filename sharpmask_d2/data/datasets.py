"""Registers datasets in COCO format with Detectron2 by name."""

import argparse
import os
from collections.abc import Iterable, Sequence
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .coco import load_records

# Suffix of a name in `--dataset`, for a dataset that does not annotate every object.
NOT_EXHAUSTIVE = ":not-exhaustive"


def add_dataset_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--dataset NAME JSON IMAGE_ROOT`, whose values are for `register_datasets`, to a parser. It may be repeated."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGE_ROOT"),
        help="register a dataset in COCO format; may be repeated. NAME:not-exhaustive says that objects may lack an annotation: in "
        "training with INPUT.SCALE_JITTER, regions without annotations then do not count as background",
    )


def check_datasets(key: str, names: Sequence[str]) -> None:
    """Check that a config names registered datasets.

    Args:
        key: of the config, such as DATASETS.TRAIN.
        names: the value of the key.

    Raises:
        UserError: there are no names, or a dataset is not registered.
    """
    if not names:
        raise UserError(f"{key} is empty: name a data set there, and register it with --dataset NAME JSON IMAGE_ROOT")
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"{key}: there is no data set {name!r}: register it with --dataset NAME JSON IMAGE_ROOT")


def register_datasets(datasets: Iterable[Sequence[str]]) -> None:
    """Register datasets in COCO format with Detectron2. A name that is registered already stays as it is.

    Args:
        datasets: (name, path of the annotation file, folder of the images) of each; the name ends in `NOT_EXHAUSTIVE` if objects may lack
            an annotation.

    Raises:
        FileNotFoundError: the file or the folder does not exist.
    """
    for given, json_file, image_root in datasets:
        name = given.removesuffix(NOT_EXHAUSTIVE)
        if not os.path.isfile(json_file):
            raise FileNotFoundError(f"dataset {name}: there is no annotation file {json_file}")
        if not os.path.isdir(image_root):
            raise FileNotFoundError(f"dataset {name}: there is no image folder {image_root}")
        if name not in DatasetCatalog:
            # As Detectron2's register_coco_instances, except that annotations are checked when they are read.
            DatasetCatalog.register(name, partial(load_records, json_file, image_root, name))
            MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")
            MetadataCatalog.get(name).set(exhaustive=name == given)
