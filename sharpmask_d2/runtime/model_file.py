"""The file `model.json` of an exported model: all that a runner needs to know besides the graphs. It needs neither torch nor Detectron2.

Shape letters: L levels, D kinds of windows.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Union

from ..errors import UserError

MODEL_FILE = "model.json"
# Raised when a runner could no longer read older files.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A SharpMask on a feature pyramid, as exported. Attributes are in the order in which a runner reads them."""

    # Name of the model or of its config.
    name: str
    # "onnx" or "openvino": the format of the graphs.
    format: str
    # "float32" or "int8".
    precision: str
    # Order of the channels of the encoder's image, "RGB" or "BGR".
    channels: str
    # Shorter side that images are resized to, and maximum of the longer side, in pixels.
    min_size: int
    max_size: int
    # Divisor of the sides of the padded image.
    size_divisibility: int
    # Strides of the L levels in pixels, fine to coarse.
    strides: list[int]
    # Sides of the D kinds of windows in cells.
    window_cells: list[int]
    # Side of the window whose mask is decoded, in sides of the window that is scored.
    mask_window: float
    # Maximum number of proposals per image, and how many of them are refined.
    num_proposals: int
    num_refined: int
    # IoU of windows for `spread`, and IoU of boxes for non-maximum suppression; 1 keeps all.
    window_nms_thresh: float
    nms_thresh: float
    # Probability above which a pixel belongs to the mask.
    mask_threshold: float
    # Side of the masks in cells.
    mask_size: int
    # Whether scores are multiplied by the stability of the masks, and lowered by Matrix NMS.
    stability: bool
    mask_nms: bool

    def write(self, folder: Union[str, Path]) -> None:
        """Writes the file into a folder that exists."""
        text = json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, indent=2)
        (Path(folder) / MODEL_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Union[str, Path]) -> "ExportedModel":
        """Reads the file of a folder.

        Raises:
            UserError: the folder has no such file, or one that is broken or of another version; the message names the file.
        """
        path = Path(folder) / MODEL_FILE
        if not path.is_file():
            raise UserError(f"there is no {path}: name a folder that `sharpmask export-model` has written")
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("version")
            if version != _VERSION:
                raise UserError(f"{path} has version {version}, {_VERSION} is expected: export the model again")
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no file of an exported model ({error}): export the model again") from None
