"""What tests draw and build: small datasets in COCO format, examples for detectors, and tiny models with random weights."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import colorsys
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycocotools.mask as coco_mask
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXIF_ORIENTATION = 0x0112
SHAPES = ("rectangle", "ellipse", "triangle")


class DrawnDataset(NamedTuple):
    """A drawn dataset in COCO format on disk."""

    annotations: Path  # the JSON file
    image_root: Path  # folder of the images
    masks: dict  # image_id -> list of (H, W) bool masks of its objects without crowds


def draw_polygon(shape: str, box) -> list:
    """[x0, y0, x1, y1, ...] of a shape that fills a box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = (float(v) for v in box)
    if shape == "rectangle":
        return [x0, y0, x1, y0, x1, y1, x0, y1]
    if shape == "triangle":
        return [(x0 + x1) / 2, y0, x1, y1, x0, y1]
    angles = np.arange(48) * (2 * np.pi / 48)
    points = np.stack([x0 + (x1 - x0) * (1 + np.cos(angles)) / 2, y0 + (y1 - y0) * (1 + np.sin(angles)) / 2], axis=1)
    return points.round(2).ravel().tolist()


def polygon_mask(polygon: list, size: tuple) -> np.ndarray:
    """(H, W) bool, as pycocotools fills it."""
    return coco_mask.decode(coco_mask.frPyObjects([polygon], *size))[:, :, 0].astype(bool)


def uncompressed_rle(mask: np.ndarray) -> dict:
    """A mask (H, W) as RLE with a list of counts, as COCO stores crowds."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def compressed_rle(mask: np.ndarray) -> dict:
    """A mask (H, W) as compressed RLE whose counts are text, as in COCO results."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def draw_dataset(
    folder: Path,
    *,
    num_images: int = 3,
    size: tuple = (120, 160),
    objects_per_image: int = 3,
    rle: bool = False,
    crowd: bool = False,
    grey: bool = False,
    exif: bool = False,
    empty: bool = False,
    seed: int = 0,
) -> DrawnDataset:
    """Draw images of saturated objects that do not touch on a grey background, and write them in COCO format.

    Args:
        folder: gets instances.json and images/.
        num_images: their ids are 1, 2, ...
        size: (H, W).
        objects_per_image: at most 6; their categories alternate between 3 and 7.
        rle: masks as compressed RLE, not as polygons.
        crowd: the last object of image 1 is a crowd, in uncompressed RLE.
        grey: image 1 is a greyscale file.
        exif: image 1 is a JPEG stored on its side, with orientation tag 6; the annotations are for the upright image.
        empty: add an image without objects.
        seed: of the pixels and places, which otherwise depend on the image's number only.

    Returns:
        DrawnDataset.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations, masks = [], [], {}
    for image_id in range(1, num_images + empty + 1):
        rng = np.random.default_rng([seed, image_id])
        count = objects_per_image if image_id <= num_images else 0
        pixels = np.repeat(rng.integers(90, 130, (*size, 1), dtype=np.uint8), 3, axis=2)
        masks[image_id] = []
        for number, box in enumerate(_places(count, size, rng)):
            polygon = draw_polygon(SHAPES[(number + image_id) % 3], box)
            mask = polygon_mask(polygon, size)
            color = np.array(colorsys.hsv_to_rgb(rng.random(), 1, 1)) * 255
            pixels[mask] = 250 if grey and image_id == 1 else color
            is_crowd = crowd and image_id == 1 and number == count - 1
            if is_crowd:
                segmentation = uncompressed_rle(mask)
            else:
                masks[image_id].append(mask)
                segmentation = compressed_rle(mask) if rle else [polygon]
            ys, xs = np.nonzero(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": (3, 7)[number % 2],
                    "iscrowd": int(is_crowd),
                    "bbox": [int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)],
                    "area": int(mask.sum()),
                    "segmentation": segmentation,
                }
            )
        name = f"{image_id}.jpg" if exif and image_id == 1 else f"{image_id}.png"
        _save(pixels, folder / "images" / name, grey=grey and image_id == 1, exif=exif and image_id == 1)
        images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "odd"}, {"id": 7, "name": "even"}],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return DrawnDataset(path, folder / "images", masks)


def _places(count: int, size: tuple, rng) -> list:
    """Boxes of `count` objects, each in a place of its own on a grid of 2 x 3."""
    height, width = size[0] / 2, size[1] / 3
    boxes = []
    for place in rng.permutation(6)[:count]:
        centre = (np.array([place % 3, place // 3]) + rng.uniform(0.45, 0.55, 2)) * (width, height)
        half = rng.uniform(0.25, 0.4, 2) * (width, height)
        boxes.append(np.concatenate([centre - half, centre + half]).round())
    return boxes


def _save(pixels: np.ndarray, path: Path, *, grey: bool, exif: bool) -> None:
    if exif:
        tags = Image.Exif()
        # 6: viewers rotate the image clockwise, so it is stored rotated the other way.
        tags[EXIF_ORIENTATION] = 6
        Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(path, exif=tags, quality=95, subsampling=0)
    else:
        Image.fromarray(pixels[:, :, 0] if grey else pixels).save(path)


def draw_example(objects: list, size: tuple, *, kind: str = "polygon", seed: int = 0) -> tuple:
    """An image (3, H, W) in a detector's normalisation, of bright rectangles (x0, y0, x1, y1) and noise, and its ground truth.

    Masks are polygons, bitmaps ("bitmap") or absent (any other kind).
    """
    image = 0.3 * torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))
    masks = torch.zeros(len(objects), *size, dtype=torch.bool)
    for i, (x0, y0, x1, y1) in enumerate(objects):
        masks[i, y0:y1, x0:x1] = True
        image[i % 3, y0:y1, x0:x1] += 2
    gt = Instances(size)
    gt.gt_boxes = Boxes(torch.tensor(objects, dtype=torch.float32).reshape(-1, 4))
    gt.gt_classes = torch.zeros(len(objects), dtype=torch.long)
    if kind == "bitmap":
        gt.gt_masks = BitMasks(masks)
    elif kind == "polygon" and objects:
        gt.gt_masks = PolygonMasks([[np.array([a, b, c, b, c, d, a, d], dtype=np.float64)] for a, b, c, d in objects])
    return image, gt


def gradient(module):
    """Sum of absolute gradients, None if no parameter has one."""
    gradients = [p.grad.abs().sum() for p in module.parameters() if p.grad is not None]
    return sum(gradients).item() if gradients else None


def write_with_weights(cfg, folder: Path) -> Path:
    """Build the model of `cfg`, save its random weights, name them in `cfg`, and write it. Returns the path of the yaml."""
    torch.manual_seed(0)
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    path = folder / "model.yaml"
    path.write_text(cfg.dump())
    return path


def to_small_detector(cfg, *, roi_heads: str, num_classes: int) -> None:
    """Turn `tiny_cfg`, in place, into a detector on ResNet-18 whose proposals SharpMask makes."""
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "SharpMask"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.ROI_HEADS.NAME = roi_heads
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
