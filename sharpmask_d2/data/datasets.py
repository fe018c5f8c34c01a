"""Registering datasets in COCO format by name."""

import argparse
import os
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .coco import load_records

# Behind the name in `--dataset`, for a dataset that does not annotate every object.
NOT_EXHAUSTIVE = ":not-exhaustive"


def add_dataset_option(parser: argparse.ArgumentParser) -> None:
    """Give a script the repeatable option `--dataset NAME JSON IMAGE_ROOT`, for `register_datasets`."""
    parser.add_argument(
        "--dataset",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGE_ROOT"),
        help="register a dataset in COCO format; repeatable. NAME:not-exhaustive says that objects may lack an annotation: what is not "
        "annotated then does not count as background in training with INPUT.SCALE_JITTER",
    )


def check_datasets(key: str, names: tuple) -> None:
    """
    Args:
        key: of the config.
        names: what it names.

    Raises:
        UserError: there are no names, or one is not registered.
    """
    if not names:
        raise UserError(f"{key} is empty: name a data set there, and register it with --dataset NAME JSON IMAGE_ROOT")
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(f"{key}: there is no data set {name!r}: register it with --dataset NAME JSON IMAGE_ROOT")


def register_datasets(datasets: list) -> None:
    """Register COCO-format datasets with Detectron2.

    Args:
        datasets: (name, path of the JSON, folder of the images) of each, with `NOT_EXHAUSTIVE` behind the name if objects may lack an
            annotation; a name that is registered already is left alone.

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
            # As Detectron2's register_coco_instances, but with annotations that are checked when they are read.
            DatasetCatalog.register(name, partial(load_records, json_file, image_root, name))
            MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")
            MetadataCatalog.get(name).set(exhaustive=name == given)
