"""Draws the inputs of measurements, which depend on the arguments alone.

Shape letters: H W image, G objects, N boxes.
"""

import cv2
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances


def draw_image(height: int, width: int) -> torch.Tensor:
    """(3, H, W) uint8 with structure of all sizes."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.float32)
    for cells in (2, 5, 12, 40):
        noise = rng.uniform(0, 64, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST)
    return torch.from_numpy(image.astype(np.uint8).transpose(2, 0, 1).copy())


def draw_boxes(count: int, size: tuple) -> Boxes:
    """(N, 4) XYXY boxes of all sizes from 16 pixels in an image of (height, width)."""
    rng = np.random.default_rng(0)
    height, width = size
    sides = np.exp(rng.uniform(np.log(16), np.log(min(size)), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
    return Boxes(torch.from_numpy(np.concatenate([corners, corners + sides], axis=1)).float())


def draw_proposals(count: int, size: tuple) -> Instances:
    """N boxes with scores, as a detector reads precomputed ones."""
    proposals = Instances(size)
    proposals.proposal_boxes = draw_boxes(count, size)
    proposals.objectness_logits = torch.linspace(2, -2, count)
    return proposals


def draw_objects(count: int, size: tuple, num_classes: int) -> Instances:
    """G ellipses in boxes of all sizes: gt_boxes, gt_classes, gt_masks (BitMasks)."""
    objects = Instances(size)
    objects.gt_boxes = draw_boxes(count, size)
    objects.gt_classes = torch.arange(count) % num_classes
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    x0, y0, x1, y1 = objects.gt_boxes.tensor[:, :, None, None].unbind(1)
    across, down = (2 * columns - x0 - x1) / (x1 - x0), (2 * rows - y0 - y1) / (y1 - y0)
    objects.gt_masks = BitMasks(across**2 + down**2 < 1)
    return objects
