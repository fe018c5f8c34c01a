"""Computes the proposals of millions of images with Ray Data, on the cores or GPUs of one machine or of a cluster.

Each actor, a process that Ray starts, builds the model once and works on blocks of images; Ray starts an actor that dies again and repeats
its block. Each block becomes one Parquet file. A run that is started again leaves out the images that have a row already, so that no other
record of what is done exists that could disagree with the results.
"""

import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode

from .. import __version__
from ..console import is_quiet, print_status, print_summary
from ..data.failed_images import describe
from ..errors import UserError
from ..extras import RAY, import_extra
from ..inference.caching import keep_between_images
from ..inference.configuration import build_config
from ..inference.predictor import ProposalPredictor
from ..io.fingerprint import changed_settings, config_settings
from ..io.outputs import check_outputs
from ..io.proposal_files import to_results
from .images import check_extends, list_files, read_list, read_uri, rows
from .results import IMAGES, RESULTS, SETTINGS, finished_ids, read_errors, result_schema, to_coco, to_row
from .storage import Folder, open_folder, pa, pq

# Makes the COCO results of an image from its pixels, (H, W, 3) uint8 BGR; their image_id is replaced.
Work = Callable[[np.ndarray], list[dict[str, Any]]]
# Builds the model in an actor, for a number of CPU threads.
Prepare = Callable[[int], Work]

# How often a file is read that the network does not deliver.
_TRIES = 3
# Seconds before the second attempt to read a file; the time doubles for each further one.
_WAIT = 1.0


def compute_in_bulk(
    *,
    output: str,
    input: Optional[Sequence[str]] = None,
    parquet: Optional[str] = None,
    coco: Optional[str] = None,
    actors: tuple[int, int] = (1, 1),
    num_cpus: int = 1,
    num_gpus: float = 0.0,
    images_per_file: int = 64,
    address: Optional[str] = None,
    dtype: str = "float32",
    **config: Any,
) -> int:
    """Computes the proposals of images and writes them as Parquet. A run that was stopped resumes when it is started again.

    Args:
        output: folder to write, local path or URI; on a cluster, all machines have to see it.
        input: image files and folders; None reads the images from `parquet`.
        parquet: see `images.read_list`; read only without `input`.
        coco: COCO result JSON to write when all images are done; None writes none.
        actors: minimum and maximum number of actors; Ray starts more while images wait and the cluster has room.
        num_cpus: CPU threads of each actor.
        num_gpus: GPUs of each actor; a fraction lets actors share one.
        images_per_file: images of a block, which is written as one file and is what an actor that dies has to do again.
        address: of a Ray cluster, such as "auto" on one of its machines; None starts Ray in this machine alone, for this run.
        dtype: see `ProposalPredictor`.
        config: see `build_config`.

    Returns:
        Exit status: 1 if an image failed, else 0.

    Raises:
        UserError: see `build_config`, `images.read_list` and `run`; or the folder has results of other images or settings.
        OutputError: see `check_outputs`.
    """
    cfg = build_config(**config)
    if num_gpus and cfg.MODEL.DEVICE == "cpu":
        raise UserError("--num-gpus: MODEL.DEVICE is cpu; set MODEL.DEVICE cuda")
    if coco:
        check_outputs({"--coco": coco}, inputs=[config.get("config_file"), cfg.MODEL.WEIGHTS], images=input or [])
    images = list_files(input) if input else read_list(parquet or "")
    folder = open_folder(output, create=True)
    _check_run(folder, output, images, {**config_settings(cfg), "--dtype": dtype, "version": __version__})
    done = finished_ids(folder)
    waiting = images.filter(pa.array([image_id not in done for image_id, _ in rows(images)], pa.bool_()))
    if done:
        print_status(f"{len(images) - len(waiting)} of {len(images)} images are done already, in {output}")
    if len(waiting):
        run(
            waiting,
            folder,
            partial(prepare_proposals, cfg=cfg, dtype=dtype),
            actors=actors,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            images_per_file=images_per_file,
            address=address,
        )
    failed = sum(1 for _ in read_errors(output))
    print_status(f"wrote the proposals of {len(images) - failed} images: {output}")
    if failed:
        print_status(f"{failed} images could not be processed: the column error of their rows says why")
    if coco:
        print_status(f"wrote {to_coco(output, coco)} proposals: {coco}")
    print_summary({"images": len(images) - failed, "failed": failed, "output": output})
    return int(failed > 0)


def _check_run(folder: Folder, output: str, images: Any, settings: dict[str, Any]) -> None:
    """Checks that a run that is resumed has equal settings and images, and records those of a new one."""
    former = folder.read_json(SETTINGS)
    if former is None:
        folder.filesystem.create_dir(folder.file(RESULTS))
        folder.write_json(SETTINGS, settings)
    elif changes := changed_settings(former, settings):
        raise UserError(f"{output} was written with other settings: {'; '.join(changes[:4])}: choose another output")
    if folder.filesystem.get_file_info(folder.file(IMAGES)).is_file:
        check_extends(pq.read_table(folder.file(IMAGES), filesystem=folder.filesystem), images, output)
    folder.write_table(IMAGES, images)


def run(
    images: Any,
    folder: Folder,
    prepare: Prepare,
    *,
    actors: tuple[int, int],
    num_cpus: int,
    num_gpus: float,
    images_per_file: int,
    address: Optional[str],
) -> None:
    """Works on images with Ray and writes their rows into the folder. An image that fails has a row with its error.

    Args:
        images: table with image_id, uri and file_name.
        folder: of the run; files are added to its folder of results.
        prepare: a function that can be pickled. It builds the model in each actor.
        actors, num_cpus, num_gpus, images_per_file, address: see `compute_in_bulk`.

    Raises:
        UserError: Ray has ended the run; the message has the cause.
    """
    _set_environment(address)
    ray = import_extra("ray", requirement=RAY)
    data = import_extra("ray.data", requirement=RAY)
    started = _start(ray, address, actors[1] * num_cpus)
    # Without a terminal, Ray would log its progress, several lines every ten seconds.
    data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty() and not is_quiet()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    blocks = [images.slice(first, images_per_file) for first in range(0, len(images), images_per_file)]
    try:
        data.from_arrow(blocks).map_batches(
            _Actor,
            fn_constructor_kwargs={"prepare": prepare, "threads": num_cpus, "schema": result_schema(images)},
            batch_format="pyarrow",
            batch_size=images_per_file,
            compute=data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1]),
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
        ).write_parquet(
            folder.file(RESULTS),
            filesystem=folder.filesystem,
            # Writing waits for the disk or the network; all cores belong to the actors.
            ray_remote_args={"num_cpus": 0},
        )
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines()
        raise UserError(
            f"Ray has ended the run: {lines[-1]}; start it again to continue after the images done so far"
        ) from error
    finally:
        if started:
            ray.shutdown()


def _set_environment(address: Optional[str]) -> None:
    """Sets what Ray reads from the environment when it is imported, unless the user has set it or has imported Ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None and "ray" not in sys.modules:
        # Ray then listens at 127.0.0.1 only, on every operating system.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # For this run alone; otherwise Ray writes a token into the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _start(ray: Any, address: Optional[str], num_cpus: int) -> bool:
    """Connects with a cluster, or starts Ray for this run in this machine. Returns whether Ray was not running before."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(address="local", num_cpus=max(num_cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
    return True


def prepare_proposals(threads: int, *, cfg: CfgNode, dtype: str) -> Work:
    """Builds a predictor of proposals in an actor: a `Prepare` for all models of this package.

    Args:
        threads: number of CPU threads of the network.
        cfg: see `ProposalPredictor`.
        dtype: see `ProposalPredictor`.

    Raises:
        UserError: see `ProposalPredictor`.
    """
    torch.set_num_threads(threads)
    cv2.setNumThreads(0)
    keep_between_images()
    predictor = ProposalPredictor(cfg, dtype=dtype)
    return lambda pixels: to_results(predictor(pixels), 0)


class _Actor:
    """Works on blocks of images. Ray makes one object in each of the processes that it starts."""

    def __init__(self, *, prepare: Prepare, threads: int, schema: Any):
        self._work, self._schema = prepare(threads), schema

    def __call__(self, images: Any) -> Any:
        """The rows of a block of images."""
        return pa.Table.from_pylist(
            [{**image, **self._row(image["uri"])} for image in images.to_pylist()], self._schema
        )

    def _row(self, uri: str) -> dict[str, Any]:
        # As in `FailedImages`, any exception is a failure of its image.
        try:
            pixels = _read(uri)
            return to_row(self._work(pixels), pixels.shape[:2])
        except MemoryError:
            raise
        except Exception as error:
            return {"error": describe(error)}


def _read(uri: str) -> np.ndarray:
    """The pixels of an image; a network that fails is tried again."""
    for attempt in range(_TRIES):
        try:
            return read_uri(uri)
        except OSError:
            if "://" not in uri or attempt == _TRIES - 1:
                raise
            time.sleep(_WAIT * 2**attempt)
    raise AssertionError
