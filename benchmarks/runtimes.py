"""Time, memory and average recall of one model in torch and as exported graphs, each in a process of its own."""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from sharpmask_d2.data.images import read_image
from sharpmask_d2.evaluation.proposal_evaluation import evaluate_proposal_json
from sharpmask_d2.inference.configuration import build_config
from sharpmask_d2.inference.predictor import ProposalPredictor
from sharpmask_d2.io.proposal_files import to_results
from sharpmask_d2.runtime import Predictor
from sharpmask_d2.runtime.model_file import ExportedModel

from .memory import forget_peak, peak_megabytes

# Counts of proposals whose average recall is printed.
_COUNTS = (10, 100, 1000)


class RuntimeRun:
    """A model in one runtime and dtype. Its process waits between photographs."""

    def __init__(self, source: str, dtype: Optional[str], num_proposals: int):
        """
        Args:
            source: name of a packaged model, which runs in torch, or folder of an exported model.
            dtype: of the model in torch; None for an exported model.
            num_proposals: maximum number of proposals per image; 0: that of the model.
        """
        if dtype is None:
            exported = ExportedModel.read(source)
            self.name = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[exported.format], exported.precision
        else:
            self.name = "torch", dtype
        self.num_proposals = num_proposals
        self._process = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_load, initargs=(source, dtype, num_proposals)
        )
        self.seconds: list[float] = []
        self.results: list[dict[str, Any]] = []

    def __call__(self, path: Path, image_id: int, *, keep: bool = False) -> None:
        """Computes the proposals of a photograph.

        Args:
            path, image_id: of the photograph.
            keep: whether the results are kept for the evaluation, and the time is not. Default: False.
        """
        seconds, results = self._process.submit(_work, path, image_id, keep).result()
        if keep:
            self.results += results
        else:
            self.seconds.append(seconds)

    def figures(self, annotations: Optional[str]) -> dict[str, Any]:
        """Figures of all photographs; ends the process.

        Args:
            annotations: COCO file of the photographs whose results were kept; None if none were.
        """
        peak = self._process.submit(_peak).result()
        self._process.shutdown()
        runtime, dtype = self.name
        figures = {"runtime": runtime, "dtype": dtype, "proposals": self.num_proposals or "all"}
        if annotations:
            recall = evaluate_proposal_json(annotations, self.results)["segm"]
            figures |= {f"mask AR@{count}": recall[f"AR@{count}"] for count in _COUNTS}
        median, fastest = statistics.median(self.seconds), min(self.seconds)
        return {**figures, "seconds": median, "fastest": fastest, "peak MB": peak}


def _load(source: str, dtype: Optional[str], num_proposals: int) -> None:
    global _predict, _loaded
    if dtype is None:
        exported = Predictor(source, threads=torch.get_num_threads(), num_proposals=num_proposals or None)

        def predict(pixels: np.ndarray, image_id: int) -> list[dict[str, Any]]:
            return exported(pixels).to_results(image_id)

    else:
        cfg = build_config(source, num_proposals=num_proposals or None, opts=["MODEL.DEVICE", "cpu"])
        trained = ProposalPredictor(cfg, dtype=dtype)

        def predict(pixels: np.ndarray, image_id: int) -> list[dict[str, Any]]:
            return to_results(trained(pixels), image_id)

    _predict = predict
    forget_peak(torch.device("cpu"))
    _loaded = peak_megabytes(torch.device("cpu"))


def _work(path: Path, image_id: int, keep: bool) -> tuple[float, list[dict[str, Any]]]:
    """Seconds from pixels to results, and the results where they are kept."""
    pixels = read_image(path)
    if not keep:
        # The process has waited: the first photograph wakes it up.
        _predict(pixels, image_id)
    start = time.perf_counter()
    results = _predict(pixels, image_id)
    return time.perf_counter() - start, results if keep else []


def _peak() -> float:
    """Peak memory beside the loaded model, in MB."""
    return peak_megabytes(torch.device("cpu")) - _loaded


def time_runtimes(
    sources: list[tuple[str, Optional[str]]],
    images: list[tuple[int, Path]],
    annotations: Optional[str],
    *,
    num_proposals: list[int],
    num_timed: int,
) -> list[dict[str, Any]]:
    """Measures models in turn, photograph by photograph, so that other work on the machine affects all of them.

    Args:
        sources: pairs of a model and its dtype: see `RuntimeRun`.
        images: id and path of each photograph.
        annotations: COCO file for the average recall; None leaves it out.
        num_proposals: maximum numbers of proposals per image; 0: that of the model.
        num_timed: number of photographs that are timed, from the first.
    """
    runs = [RuntimeRun(source, dtype, count) for count in num_proposals for source, dtype in sources]
    for image_id, path in images[:num_timed]:
        for run in runs:
            run(path, image_id)
    for run in runs if annotations else []:
        for image_id, path in images:
            run(path, image_id, keep=True)
    return [run.figures(annotations) for run in runs]
