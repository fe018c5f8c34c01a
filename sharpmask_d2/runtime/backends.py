"""Runs the two graphs of an exported model, with onnxruntime or with OpenVINO.

Shape letters: N windows whose masks are refined, K windows whose masks are coarse, M mask side in cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Protocol

import numpy as np

from ..errors import UserError
from ..extras import ONNX, OPENVINO, import_extra
from .model_file import ExportedModel


class Graph(Protocol):
    """A graph that is ready to run."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs of the graph, in its order.

        Args:
            inputs: in the order of the graph.
        """


class OnnxGraph:
    """A graph in ONNX."""

    def __init__(self, path: Path, threads: Optional[int]):
        """
        Args:
            path: of the file.
            threads: number of CPU threads; None: one per core.

        Raises:
            UserError: onnxruntime is not installed.
        """
        onnxruntime = import_extra("onnxruntime", requirement=ONNX)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Graph`."""
        return self._session.run(None, dict(zip(self._names, inputs)))


class OpenvinoGraph:
    """A graph in the format of OpenVINO."""

    def __init__(self, path: Path, threads: Optional[int], counts: Sequence[int] = ()):
        """
        Args:
            path: of the .xml file.
            threads: number of CPU threads; None: one per core.
            counts: numbers of windows of the last inputs, which are fixed; none by default.

        Raises:
            UserError: openvino is not installed.
        """
        openvino = import_extra("openvino", requirement=OPENVINO)
        core = openvino.Core()
        model = core.read_model(str(path))
        if counts:
            first = len(model.inputs) - len(counts)
            model.reshape({first + number: [count, 4] for number, count in enumerate(counts)})
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Graph`. The names of OpenVINO's outputs are not those of the graph."""
        outputs = self._request.infer(list(inputs), share_inputs=True)
        return [outputs[number] for number in range(len(outputs))]


class Decoder:
    """Decodes the masks of windows."""

    def __init__(self, graph: Graph, counts: Optional[tuple[int, int]]):
        """
        Args:
            graph: the decoder.
            counts: N and K, both above 0, that the graph takes; None: it takes any.
        """
        self._graph, self._counts = graph, counts

    def __call__(
        self, tables: Sequence[np.ndarray], image_size: np.ndarray, windows: np.ndarray, coarse_windows: np.ndarray
    ) -> np.ndarray:
        """
        Args:
            tables: outputs of the encoder behind the scores.
            image_size: (2,) int64, height and width of the resized image in pixels.
            windows: (N, 4) float32 XYXY squares in pixels of the resized image, whose masks are refined.
            coarse_windows: (K, 4), whose masks are not refined.

        Returns:
            (N + K, M, M) float32 logits.
        """
        if self._counts is None:
            return np.concatenate(self._graph.run([*tables, image_size, windows, coarse_windows]))
        kinds = (windows, coarse_windows)
        runs = max(1, *(-(-len(boxes) // count) for boxes, count in zip(kinds, self._counts)))
        filled = [_filled(boxes, runs * count).reshape(runs, count, 4) for boxes, count in zip(kinds, self._counts)]
        outputs = [self._graph.run([*tables, image_size, *parts]) for parts in zip(*filled)]
        masks = [np.concatenate(parts) if runs > 1 else parts[0] for parts in zip(*outputs)]
        return np.concatenate([x[: len(boxes)] for x, boxes in zip(masks, kinds)])


def load_graphs(
    folder: Path, model: ExportedModel, num_proposals: int, threads: Optional[int]
) -> tuple[Graph, Decoder]:
    """Loads the encoder and the decoder of an exported model.

    Args:
        folder: of the model.
        model: what its file says.
        num_proposals: number of windows per image.
        threads: number of CPU threads; None: one per core.

    Raises:
        UserError: a file is missing, or the library that runs the graphs is not installed; the message names it.
    """
    suffix = "onnx" if model.format == "onnx" else "xml"
    encoder, decoder = (folder / f"{name}.{suffix}" for name in ("encoder", "decoder"))
    for path in (encoder, decoder):
        if not path.is_file():
            raise UserError(f"there is no {path}: export the model again")
    if model.format == "onnx":
        return OnnxGraph(encoder, threads), Decoder(OnnxGraph(decoder, threads), None)
    # OpenVINO samples features with an operator that needs fixed numbers of windows.
    refined = min(model.num_refined, num_proposals)
    counts = max(1, refined), max(1, num_proposals - refined)
    return OpenvinoGraph(encoder, threads), Decoder(OpenvinoGraph(decoder, threads, counts), counts)


def _filled(windows: np.ndarray, count: int) -> np.ndarray:
    """`count` windows: those that are given, and copies of one of them or of any window."""
    filler = windows[:1] if len(windows) else np.array([[0, 0, 1, 1]], np.float32)
    return np.concatenate([windows, np.repeat(filler, count - len(windows), axis=0)])
