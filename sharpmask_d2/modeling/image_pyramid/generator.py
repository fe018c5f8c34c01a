"""Segment proposals from an image pyramid (DeepMask, section 3.3; SharpMask, section 3.3).

Shape letters: B images, H W height and width of an image in pixels, h w of a level, N proposals, M mask side in cells.
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
from ...windows.geometry import corner_aligned
from .levels import cell_windows, grid_shifts, level_padding, pyramid_levels, split_cells
from .network import SharpMaskNetwork, WindowGrid
from .resizing import resize


class ImagePyramid(nn.Module):
    """Segment proposals of images: one pass of the trunk per level, then masks for the windows of highest score over all levels.

    The stand-alone network and the proposal generator of detectors both hold one.
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
            exponents: scales of the levels, as exponents of 2.
            grid_stride: distance of neighbouring windows in pixels of the level, a divisor of the network's stride.
            num_proposals: maximum number of proposals per image.
            mask_threshold: probability, in 0..1, above which a pixel belongs to the mask.
            nms_thresh: IoU above which a proposal's box suppresses boxes of lower score; 1 keeps all, as in the papers.
            stability, mask_nms: see `structures.build_proposals`; default: False.
            windows_per_batch: number of windows that are refined at a time, which bounds the memory.

        Raises:
            UserError: a threshold outside 0..1, less than one proposal, or a grid stride that does not divide the network's; the message
                names the config key.
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
        """Generate the proposals of one image.

        Args:
            image: (3, H, W) in 0..255, in the network's channel order.

        Returns:
            Instances of at most `num_proposals` proposals, best first, in the frame of the image: proposal_boxes (Boxes, tight),
            objectness_logits (N,), proposal_masks (WindowMasks). Windows whose mask is empty inside the image are left out.

        Raises:
            UserError: the image has no pixels.
        """
        return self.of_batch(image[None])[0]

    @torch.no_grad()
    def of_batch(self, images: Tensor) -> list:
        """Generate proposals for a batch of equally sized images.

        Each level runs through the trunk once for the whole batch, so peak memory grows linearly with the batch size.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order.

        Returns:
            list[Instances], one per image (see `forward`).

        Raises:
            UserError: the images have no pixels.
        """
        image_size = tuple(images.shape[2:])
        if 0 in image_size:
            raise UserError(f"the image has no pixels: its size is {image_size} (height, width)")
        levels = self.levels(image_size)
        # The largest level first: it needs the most memory, and nothing of the others is kept yet.
        grids = [self.level_grid(images, level) for level in reversed(levels)][::-1]
        return [self.propose(levels, [grid.of_image(number) for grid in grids]) for number in range(len(images))]

    def levels(self, image_size: tuple, octaves: float = 0.0) -> list:
        """The levels of an image.

        Args:
            image_size: (height, width) of the image in pixels.
            octaves: added to the exponent of every level; default: 0.

        Returns:
            list[Level] (see `levels.pyramid_levels`).
        """
        return pyramid_levels(image_size, [exponent + octaves for exponent in self.exponents], self.shifts)

    def level_grid(self, images: Tensor, level) -> WindowGrid:
        """Run the network on a level of images.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order.
            level: one of `levels`.

        Returns:
            WindowGrid.
        """
        return self.network.grid(self.level_image(images, level))

    @torch.no_grad()
    def propose(self, levels: list, grids: list) -> Instances:
        """Choose the windows of highest score over all levels of one image, and compute their masks.

        Args:
            levels: list[Level] of the image.
            grids: list[WindowGrid], one per level, each of one image (B = 1).

        Returns:
            Instances (see `forward`).
        """
        scores = torch.cat([grid.scores.flatten() for grid in grids]).float()
        scores, chosen = scores.topk(min(self.num_proposals, len(scores)))
        # Windows are processed level by level; `order` restores the order of their scores.
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
        """Resize images to a level and add the border that its windows need.

        Args:
            images: (B, 3, H, W) in 0..255, in the network's channel order.
            level: one of `levels`.

        Returns:
            (B, 3, h, w) float32 in 0..255, channels last in memory.
        """
        resized = resize(images.float(), level.size, self.network.resizing)
        padding = level_padding(level, self.network.window_size, self.network.size_divisibility)
        padded = F.pad(resized, padding, value=PADDING_VALUE)
        return padded.contiguous(memory_format=torch.channels_last)
