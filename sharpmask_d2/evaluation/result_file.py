"""Reads a COCO result file image by image: its results are checked, and only their places in the file are kept in memory."""

import json
import math
import os
from array import array
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import Any, Optional, Union

import numpy as np
from pycocotools.coco import COCO

from ..io.json_lists import iterate_list
from .coco_results import ResultChecks


class _Places:
    """Where the results of one image are: for each its index among all results, first byte, number of bytes, and score."""

    def __init__(self) -> None:
        self.numbers, self.offsets, self.lengths, self.scores = array("q"), array("q"), array("l"), array("d")

    def add(self, number: int, offset: int, length: int, score: float) -> None:
        self.numbers.append(number)
        self.offsets.append(offset)
        self.lengths.append(length)
        self.scores.append(score)


class ResultFile:
    """A COCO result file. About 32 bytes of memory are used per result, wherever the results of an image are in the file.

    with ResultFile("proposals.json", coco) as file:
        for image_id, results in file.images():
            ...
    """

    def __init__(self, path: Union[str, os.PathLike], coco: Optional[COCO]) -> None:
        """
        Args:
            path: path of the file.
            coco: annotations that `data.coco.check_annotations` has passed. None: the images that the results name are listed, with the
                file_name of their first result as far as there is one, and without sizes and objects.

        Raises:
            FileNotFoundError: the file does not exist.
            UserError: the file is not JSON or has another format, or none of its images is in the annotations.
        """
        self.path = os.fspath(path)
        self.coco = coco or COCO()
        self._checks = ResultChecks(self.coco, self.path)
        self._places: dict[Hashable, _Places] = {}
        names: dict[Hashable, Optional[str]] = {}
        for i, (result, offset, length) in enumerate(iterate_list(path)):
            self._checks.check_entry(i, result)
            image_id, score = result["image_id"], result["score"]
            # A score that is no number is reported with the other checks of its image.
            score = float(score) if isinstance(score, (int, float)) and abs(score) < 1e300 else math.nan
            self._places.setdefault(image_id, _Places()).add(i, offset, length, score)
            if names.get(image_id) is None:
                names[image_id] = result.get("file_name")
        if coco is None:
            self.coco.imgs = {image_id: {"id": image_id, "file_name": name} for image_id, name in names.items()}
        self._checks.check_images()
        self._file = open(self.path, "rb")  # noqa: SIM115  (closed by `close`)

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def has_masks(self) -> bool:
        """Whether the results have segmentations."""
        return self._checks.has_masks

    def image_ids(self) -> Collection[Hashable]:
        """The ids of the images that the file names, in its order."""
        return self._places.keys()

    def count(self, image_id: Hashable) -> int:
        """Number of results of an image, 0 for one that the file does not name."""
        return self._checks.counts.get(image_id, 0)

    def images(self) -> Iterator[tuple[Hashable, list[dict[str, Any]]]]:
        """Read and check the results of all images. Warnings are logged at the end.

        Yields:
            The id and all results of each image that is in the annotations and has results, in the order of the annotations.

        Raises:
            UserError: a result is broken; the message names it.
        """
        for image_id in self.coco.imgs:
            if image_id in self._places:
                results = self.read(image_id)
                self._checks.check_image(image_id, results, self._places[image_id].numbers.tolist())
                yield image_id, results
        self._checks.log_warnings()

    def scores(self, image_id: Hashable) -> np.ndarray:
        """Scores of the results of an image, sorted; the highest is first, and equal ones are in the order of the file."""
        scores = np.array(self._places[image_id].scores if image_id in self._places else [])
        return scores[np.argsort(-scores, kind="stable")]

    def read(self, image_id: Hashable, ranks: Optional[Iterable[int]] = None) -> list[dict[str, Any]]:
        """Read results of one image, without checks.

        Args:
            image_id: identifier of the image.
            ranks: which results, by descending score from 0; results of equal score keep their order. Default: None, all results in the
                order of the file.

        Returns:
            The results.
        """
        places = self._places.get(image_id, _Places())
        chosen: Iterable[int] = range(len(places.numbers))
        if ranks is not None:
            order = np.argsort(-np.array(places.scores), kind="stable")
            chosen = [order[rank] for rank in ranks]
        results = []
        for i in chosen:
            self._file.seek(places.offsets[i])
            results.append(json.loads(self._file.read(places.lengths[i])))
        return results
