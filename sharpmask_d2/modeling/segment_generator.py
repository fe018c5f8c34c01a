"""The contract of every generator of segment proposals: encode, select, decode, postprocess.

    features = generator.encode(...)                 # once per batch of images
    windows = generator.select(features)             # the windows of highest score, one `Windows` per image
    logits = generator.decode(features, windows[0])  # their masks
    proposals = generator.postprocess(windows[0], logits, image_size)

Shape letters: N windows of an image, M mask side in cells, H W height and width of an image in pixels.
"""

import math
from typing import Any, NamedTuple, Optional

from detectron2.structures import Instances
from torch import Tensor, nn

from ..errors import UserError
from ..structures import WindowMasks, build_proposals
from .layers import without_gradients


class Windows(NamedTuple):
    """Square windows of one image whose masks are to be decoded."""

    # (N, 4) float32 XYXY in the frame of the resized image, in pixels; windows may lie partly outside of the image.
    boxes: Tensor
    # (N,) logits of the probability that a window holds an object in its centre; None for windows that were not selected by score.
    scores: Optional[Tensor] = None
    # Number of the image in the batch.
    image: int = 0
    # (N,) bool: windows whose masks are refined; the others get coarse masks. None refines all.
    refined: Optional[Tensor] = None
    # (N,) int64 numbers of the grid's cells that the windows belong to; read by generators on image pyramids only.
    cells: Optional[Tensor] = None


class SegmentGenerator(nn.Module):
    """Generates segment proposals in four steps, of which each kind of generator defines the first three."""

    def __init__(
        self,
        *,
        num_proposals: int,
        mask_threshold: float,
        nms_thresh: float,
        stability: bool = False,
        mask_nms: bool = False,
        windows_per_batch: int,
    ):
        """
        Args:
            num_proposals: maximum number of proposals per image.
            mask_threshold: probability, in 0..1, above which a pixel belongs to the mask.
            nms_thresh: IoU above which a proposal's box suppresses boxes of lower score; 1 keeps all, as in the papers.
            stability, mask_nms: see `structures.build_proposals`; default: False.
            windows_per_batch: number of windows whose masks are decoded at a time, which bounds the memory.

        Raises:
            UserError: a threshold outside 0..1, or less than one proposal; the message names the config key.
        """
        super().__init__()
        if not 0 < mask_threshold < 1:
            raise UserError(f"MODEL.SHARPMASK.TEST.MASK_THRESHOLD is {mask_threshold}: it must lie between 0 and 1")
        if num_proposals < 1:
            raise UserError(f"MODEL.SHARPMASK.TEST.NUM_PROPOSALS is {num_proposals}: it must be at least 1")
        self.num_proposals = num_proposals
        self.mask_threshold = math.log(mask_threshold / (1 - mask_threshold))
        self.nms_thresh, self.stability, self.mask_nms = nms_thresh, stability, mask_nms
        self.windows_per_batch = windows_per_batch

    @staticmethod
    def test_settings(cfg) -> dict[str, Any]:
        """The arguments of the constructor that MODEL.SHARPMASK.TEST of a config gives."""
        test = cfg.MODEL.SHARPMASK.TEST
        return {
            "num_proposals": test.NUM_PROPOSALS,
            "mask_threshold": test.MASK_THRESHOLD,
            "nms_thresh": test.NMS_THRESH,
            "stability": test.MASK_STABILITY,
            "mask_nms": test.MASK_NMS,
            "windows_per_batch": test.WINDOWS_PER_BATCH,
        }

    def encode(self, *inputs) -> Any:
        """Computes, once per batch of images, what all windows of the images share.

        Args:
            inputs: images, or what a detector computed of them: each kind of generator says which.

        Returns:
            A tuple with the field `image_sizes`, the (H, W) of each image, which the other steps read.
        """
        raise NotImplementedError

    def select(self, features: Any) -> list[Windows]:
        """Selects the windows of highest score.

        Args:
            features: from `encode`.

        Returns:
            One `Windows` with scores per image: at most `num_proposals` windows each, highest score first.
        """
        raise NotImplementedError

    def decode(self, features: Any, windows: Windows) -> Tensor:
        """Decodes the masks of windows.

        Args:
            features: from `encode`.
            windows: of one image.

        Returns:
            (N, M, M) mask logits, each mask covering its window.
        """
        raise NotImplementedError

    def postprocess(
        self,
        windows: Windows,
        logits: Tensor,
        image_size: tuple[int, int],
        output_size: Optional[tuple[int, int]] = None,
    ) -> Instances:
        """Turns the decoded windows of an image into its proposals: ranks, suppresses, and computes tight boxes.

        Args:
            windows: N windows with scores, highest score first.
            logits: (N, M, M), from `decode`.
            image_size: (H, W) of the image that the windows refer to.
            output_size: (H, W) of the image that the proposals refer to; default: `image_size`.

        Returns:
            Instances of at most N proposals, best first: proposal_boxes (Boxes, tight), objectness_logits, proposal_masks (WindowMasks).
            Windows whose mask is empty inside the image are left out.
        """
        masks = WindowMasks(logits, windows.boxes, image_size, threshold=self.mask_threshold)
        if output_size is not None and output_size != image_size:
            # Before `build_proposals`, so that the pixels of the masks are found only once.
            (height, width), (new_height, new_width) = image_size, output_size
            masks = masks.scale(new_width / width, new_height / height, output_size)
        return build_proposals(
            windows.scores, masks, nms_thresh=self.nms_thresh, stability=self.stability, mask_nms=self.mask_nms
        )

    @without_gradients()
    def propose(self, features: Any, output_sizes: Optional[list[tuple[int, int]]] = None) -> list[Instances]:
        """Selects, decodes and postprocesses the windows of all images of a batch.

        Args:
            features: from `encode`.
            output_sizes: (H, W) of each image that its proposals refer to; default: `features.image_sizes`.

        Returns:
            One `Instances` per image: see `postprocess`.
        """
        sizes = [tuple(size) for size in features.image_sizes]
        outputs = sizes if output_sizes is None else [tuple(size) for size in output_sizes]
        return [
            self.postprocess(windows, self.decode(features, windows), sizes[windows.image], outputs[windows.image])
            for windows in self.select(features)
        ]
