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


class _Runs:
    """Where the results of one image are: for each run of results that follow each other in the file, the index of the first one among all
    results, their number, and the first byte and the number of bytes from the first to the last."""

    def __init__(self) -> None:
        # Four entries per run, which take 32 bytes.
        self._values = array("q")

    def start(self, number: int, offset: int) -> None:
        self._values.extend((number, 0, offset, 0))

    def add(self, end: int) -> None:
        """Adds a result, which ends at a byte of the file, to the last run."""
        self._values[-3] += 1
        self._values[-1] = end - self._values[-2]

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        return zip(*(self._values[i::4] for i in range(4)))


class ResultFile:
    """A COCO result file, of which the results of one image are in memory at a time.

    The results of an image may be anywhere in the file; those that follow each other are read together.

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
        self._runs: dict[Hashable, _Runs] = {}
        names: dict[Hashable, Optional[str]] = {}
        runs, last = _Runs(), None
        for i, (result, offset, length) in enumerate(iterate_list(path)):
            self._checks.check_entry(i, result)
            image_id = result["image_id"]
            if image_id != last:
                runs, last = self._runs.setdefault(image_id, _Runs()), image_id
                runs.start(i, offset)
            runs.add(offset + length)
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
        return self._runs.keys()

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
            if image_id in self._runs:
                results = self.read(image_id)
                numbers = [first + i for first, count, _, _ in self._runs[image_id] for i in range(count)]
                self._checks.check_image(image_id, results, numbers)
                yield image_id, results
        self._checks.log_warnings()

    def scores(self, image_id: Hashable) -> np.ndarray:
        """Scores of the results of an image, sorted; the highest is first, and equal ones are in the order of the file."""
        scores = _scores(self.read(image_id))
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
        results: list[dict[str, Any]] = []
        for _, _, offset, length in self._runs.get(image_id, _Runs()):
            self._file.seek(offset)
            results += json.loads(b"[%b]" % self._file.read(length))
        if ranks is None:
            return results
        order = np.argsort(-_scores(results), kind="stable")
        return [results[order[rank]] for rank in ranks]


def _scores(results: list[dict[str, Any]]) -> np.ndarray:
    """Scores of results, nan for those that are no numbers."""
    scores = (result["score"] for result in results)
    return np.array(
        [float(x) if isinstance(x, (int, float)) and abs(x) < 1e300 else math.nan for x in scores], dtype=np.float64
    )
