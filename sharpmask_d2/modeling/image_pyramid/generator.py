"""Segment proposals from an image pyramid, as in the papers.

Shape letters: H W image, N proposals, M mask side.
"""

import math

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.structures import Instances
from torch import Tensor, nn

from ...data.patch_mapper import PADDING_VALUE
from ...errors import UserError
from ...structures import WindowMasks, build_proposals
from ...windows.geometry import cell_windows, corner_aligned, grid_shifts, level_padding, pyramid_levels
from ...windows.targets import split_cells
from .network import SharpMaskNetwork, WindowGrid
from .resizing import resize


class ImagePyramid(nn.Module):
    """From one image to its best windows: one pass of the trunk per level, then masks for the chosen windows only.

    The stand-alone network and the proposal generator both hold one of these.
    """

    @configurable
    def __init__(
        self,
        *,
        network: SharpMaskNetwork,
        exponents: list,
        grid_stride: int,
        num_proposals: int,
        mask_threshold: float,
        nms_thresh: float,
        stability: bool = False,
        mask_nms: bool = False,
        windows_per_batch: int,
    ):
        """
        Args:
            network: DeepMask or SharpMask.
            exponents: scales of the pyramid, as exponents of 2.
            grid_stride: distance of windows in pixels of the level.
            num_proposals: most proposals of an image.
            mask_threshold: probability above which a pixel is foreground.
            nms_thresh: IoU of boxes above which the lower score goes; 1 keeps all.
            stability, mask_nms: see `structures.build_proposals`.
            windows_per_batch: windows refined at a time.

        Raises:
            ValueError: a threshold outside 0..1, less than one proposal, or a grid stride that does not divide the network's.
        """
        super().__init__()
        if not 0 < mask_threshold < 1:
            raise UserError(f"MODEL.SHARPMASK.TEST.MASK_THRESHOLD is {mask_threshold}: it must lie between 0 and 1")
        if num_proposals < 1:
            raise UserError(f"MODEL.SHARPMASK.TEST.NUM_PROPOSALS is {num_proposals}: it must be at least 1")
        self.network = network
        self.exponents = list(exponents)
        self.shifts = grid_shifts(network.stride, grid_stride)
        self.num_proposals = num_proposals
        self.mask_threshold = math.log(mask_threshold / (1 - mask_threshold))
        self.nms_thresh, self.stability, self.mask_nms = nms_thresh, stability, mask_nms
        self.windows_per_batch = windows_per_batch

    @classmethod
    def from_config(cls, cfg, trunk=None):
        test = cfg.MODEL.SHARPMASK.TEST
        return {
            "network": SharpMaskNetwork(cfg, trunk=trunk),
            "exponents": test.SCALES,
            "grid_stride": cfg.MODEL.SHARPMASK.GRID_STRIDE,
            "num_proposals": test.NUM_PROPOSALS,
            "mask_threshold": test.MASK_THRESHOLD,
            "nms_thresh": test.NMS_THRESH,
            "stability": test.MASK_STABILITY,
            "mask_nms": test.MASK_NMS,
            "windows_per_batch": test.WINDOWS_PER_BATCH,
        }

    @torch.no_grad()
    def forward(self, image: Tensor) -> Instances:
        """
        Args:
            image: (3, H, W) in 0..255, in the network's channel order.

        Returns:
            Instances of at most `num_proposals` proposals, best first, in the frame of the image: proposal_boxes (Boxes, tight),
            objectness_logits (N,), proposal_masks (WindowMasks). Windows whose mask is empty inside the image are left out.

        Raises:
            ValueError: the image has no pixels.
        """
        return self.of_batch(image[None])[0]

    @torch.no_grad()
    def of_batch(self, images: Tensor) -> list:
        """The same for images of one size, whose levels go through the trunk together: memory grows with their number.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order.

        Returns:
            B Instances.

        Raises:
            ValueError: the images have no pixels.
        """
        image_size = tuple(images.shape[2:])
        if 0 in image_size:
            raise UserError(f"the image has no pixels: its size is {image_size} (height, width)")
        levels = self.levels(image_size)
        # The largest, which takes the most memory, before anything of the others is kept.
        grids = [self.level_grid(images, level) for level in reversed(levels)][::-1]
        return [self.propose(levels, [grid.of_image(number) for grid in grids]) for number in range(len(images))]

    def levels(self, image_size: tuple, octaves: float = 0.0) -> list:
        """The levels of the pyramid of an image.

        Args:
            image_size: (height, width) in pixels.
            octaves: added to every exponent.

        Returns:
            list[windows.Level].
        """
        return pyramid_levels(image_size, [exponent + octaves for exponent in self.exponents], self.shifts)

    def level_grid(self, images: Tensor, level) -> WindowGrid:
        """The grid of a level of the images (B, 3, H, W), in 0..255."""
        return self.network.grid(self.level_image(images, level))

    @torch.no_grad()
    def propose(self, levels: list, grids: list) -> Instances:
        """From the grids of all levels of one image to its proposals: see `forward`."""
        scores = torch.cat([grid.scores.flatten() for grid in grids]).float()
        scores, chosen = scores.topk(min(self.num_proposals, len(scores)))
        # Windows come level by level; `order` takes them back to the order of their scores.
        cells, order = chosen.sort()
        masks, windows = None, scores.new_empty((len(scores), 4))
        split = split_cells(cells, [tuple(grid.scores.shape[1:]) for grid in grids])
        places = order.split([len(ys) for ys, _ in split])
        for level, grid, (ys, xs), place in zip(levels, grids, split, places):
            if len(ys) == 0:
                continue
            batches = self.network.mask_batches(
                grid, torch.zeros_like(ys), ys, xs, windows_per_batch=self.windows_per_batch
            )
            for batch, own in zip(batches, place.split(self.windows_per_batch)):
                masks = batch.new_empty((len(scores), *batch.shape[1:])) if masks is None else masks
                masks[own] = batch
            windows[place] = cell_windows(level, ys, xs, self.network.window_size, self.network.stride)
        if self.network.resizing == "released":
            windows = corner_aligned(windows, masks.shape[-1])
        proposal_masks = WindowMasks(masks, windows, levels[0].image_size, threshold=self.mask_threshold)
        return build_proposals(
            scores, proposal_masks, nms_thresh=self.nms_thresh, stability=self.stability, mask_nms=self.mask_nms
        )

    def level_image(self, images: Tensor, level) -> Tensor:
        """The images (B, 3, H, W) at a level, with the border its windows need: (B, 3, h, w)."""
        resized = resize(images.float(), level.size, self.network.resizing)
        padding = level_padding(level, self.network.window_size, self.network.size_divisibility)
        padded = F.pad(resized, padding, value=PADDING_VALUE)
        return padded.contiguous(memory_format=torch.channels_last)
