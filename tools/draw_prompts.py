#!/usr/bin/env python
"""Draws the masks of clicks and boxes on six photographs, the picture of docs/prompts.md.

    python tools/draw_prompts.py --output docs/prompts.jpg

The photographs are in the public domain or CC0: five come with scikit-image (astronaut: NASA; chelsea: Stefan van der Walt; coffee: Rachel
Michetti; camera: Lav Varshney; rocket: SpaceX) and one with Matplotlib (grace_hopper: US Navy).
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_utils
from sharpmask_d2.cli.command import run
from sharpmask_d2.data.images import read_image
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference import SharpMaskPredictor
from sharpmask_d2.inference.point_windows import box_iou
from sharpmask_d2.io.outputs import write_output
from sharpmask_d2.visualization import draw_masks

SCIKIT_IMAGE, MATPLOTLIB = ("skimage", "data"), ("matplotlib", "mpl-data/sample_data")
# Rows of photographs: package and folder, file, and for each object a click (x, y) and its box (x0, y0, x1, y1), in pixels.
ROWS = [
    [
        (
            SCIKIT_IMAGE,
            "astronaut.png",
            [
                ((110, 340), (20, 15, 370, 512)),
                ((415, 120), (365, 0, 455, 290)),
                ((370, 430), (280, 340, 505, 512)),
            ],
        ),
        (SCIKIT_IMAGE, "chelsea.png", [((230, 60), (0, 0, 390, 300)), ((170, 118), (135, 85, 205, 150))]),
    ],
    [
        (MATPLOTLIB, "grace_hopper.jpg", [((110, 420), (15, 18, 512, 600)), ((300, 115), (155, 25, 372, 165))]),
        (
            SCIKIT_IMAGE,
            "coffee.png",
            [((190, 150), (172, 17, 405, 250)), ((120, 300), (75, 60, 480, 388)), ((370, 285), (318, 65, 425, 325))],
        ),
    ],
    [
        (
            SCIKIT_IMAGE,
            "camera.png",
            [((110, 250), (0, 60, 335, 512)), ((294, 260), (225, 195, 410, 512)), ((290, 158), (258, 135, 330, 195))],
        ),
        (SCIKIT_IMAGE, "rocket.jpg", [((321, 250), (307, 125, 335, 408))]),
    ],
]
TITLES = ("click: first mask", "click: best of three", "box")
# In pixels.
WIDTH, GAP, TITLE_HEIGHT = 1280, 4, 18


def read_photograph(place: tuple[str, str], name: str) -> np.ndarray:
    """Reads a photograph that comes with a package.

    Args:
        place: name of the package, and the folder within it.
        name: file name.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        UserError: the package is not installed, or lacks the file.
    """
    package, folder = place
    spec = find_spec(package)
    path = Path(spec.origin).parent / folder / name if spec and spec.origin else None
    if path is None or not path.exists():
        raise UserError(f"{name} comes with the package {package}, which is not installed or too old")
    return read_image(path)


def encode(mask: np.ndarray) -> dict:
    """Encodes a mask (H, W) bool as compressed RLE."""
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))


def draw_panels(predictor: SharpMaskPredictor, image: np.ndarray, prompts: list, height: int) -> np.ndarray:
    """Draws the masks of clicks and of boxes beside each other.

    Args:
        predictor: makes the masks.
        image: (H, W, 3) uint8 BGR.
        prompts: pairs of a click and a box.
        height: of the panels in pixels.

    Returns:
        (h, w, 3) uint8 BGR with one panel per title.
    """
    points, boxes = np.array([point for point, _ in prompts]), np.array([box for _, box in prompts])
    predictor.set_image(image)
    clicked = predictor.predict_masks(points=points[:, None])
    # The object that is meant is known by its box: of the three masks, a person would choose the one that fits it.
    overlaps = box_iou(clicked.masks.boxes().tensor.view(len(points), -1, 4), torch.from_numpy(boxes)[:, None])
    masks = clicked.masks.to_numpy().reshape(len(points), -1, *image.shape[:2])
    of_boxes = predictor.predict_masks(boxes=boxes).masks.to_numpy()
    chosen = overlaps.argmax(1).numpy()
    scale = height / image.shape[0]
    panels = []
    for number, found in enumerate([masks[:, 0], masks[np.arange(len(points)), chosen], of_boxes]):
        picture = draw_masks(image, [encode(mask) for mask in found], opacity=0.45)
        picture = cv2.resize(picture, (round(scale * image.shape[1]), height), interpolation=cv2.INTER_AREA)
        for point, box in zip((scale * points).astype(int).tolist(), (scale * boxes).astype(int).tolist()):
            if number == 2:
                cv2.rectangle(picture, box[:2], box[2:], (255, 255, 255), 1)
            else:
                cv2.circle(picture, point, 5, (0, 0, 0), -1, cv2.LINE_AA)
                cv2.circle(picture, point, 3, (255, 255, 255), -1, cv2.LINE_AA)
        title = np.full((TITLE_HEIGHT, picture.shape[1], 3), 255, np.uint8)
        cv2.putText(title, TITLES[number], (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        panels.append(
            cv2.copyMakeBorder(np.vstack([title, picture]), 0, 0, 0, GAP, cv2.BORDER_CONSTANT, value=[255] * 3)
        )
    return np.hstack(panels)


def main() -> None:
    """Draws the picture of `--output`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="JPG", help="picture to write")
    args = parser.parse_args()
    predictor = SharpMaskPredictor()
    rows = []
    for row in ROWS:
        photographs = [(read_photograph(place, name), prompts) for place, name, prompts in row]
        shares = len(TITLES) * sum(image.shape[1] / image.shape[0] for image, _ in photographs)
        height = round((WIDTH - GAP * len(TITLES) * len(row)) / shares)
        drawn = np.hstack([draw_panels(predictor, image, prompts, height) for image, prompts in photographs])
        # Widths are rounded panel by panel.
        drawn = drawn[:, :WIDTH]
        rows.append(cv2.copyMakeBorder(drawn, 0, GAP, 0, WIDTH - drawn.shape[1], cv2.BORDER_CONSTANT, value=[255] * 3))
    # The default quality of OpenCV would make a file of twice the size.
    _, content = cv2.imencode(".jpg", np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 85])
    write_output(args.output, content.tobytes())


if __name__ == "__main__":
    run(main)
