"""The stand-alone networks: one is trained on patches, the other on full images. Both generate proposals of full images at test time.

Shape letters: B patches of all images, P patches of an image, M mask side in cells, H W height and width of an image in pixels.
"""

from typing import Any, Union

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.rcnn import ProposalNetwork
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..data.patch_mapper import PatchMapper
from ..errors import UserError
from ..structures import rescale_proposals
from .exporting import NotExportable
from .image_pyramid.resizing import resize
from .image_randomness import image_seeds
from .losses import mask_iou, mask_loss, score_loss
from .proposal_generator import ImagePyramid
from .proposal_generator.sharpmask_fpn import PyramidFeatures

# Values of MODEL.META_ARCHITECTURE for the stand-alone networks; the first one is trained on patches, the second one on full images.
ARCHITECTURE = "SharpMaskProposalNetwork"
ALONE = (ARCHITECTURE, "SegmentProposalNetwork")


@META_ARCH_REGISTRY.register()
class SharpMaskProposalNetwork(NotExportable):
    """DeepMask or SharpMask on an image pyramid, without a detector (MODEL.META_ARCHITECTURE: SharpMaskProposalNetwork)."""

    @configurable
    def __init__(
        self,
        *,
        pyramid: ImagePyramid,
        mapper: PatchMapper,
        flip_channels: bool,
        mask_loss_weight: float,
        score_loss_weight: float,
    ):
        """
        Args:
            pyramid: contains the network, and generates the proposals of full images.
            mapper: cuts patches out of full training images, for data loaders that do not cut patches themselves.
            flip_channels: whether the channel order of the input is the reverse of that of the network.
            mask_loss_weight, score_loss_weight: factors of the two losses.
        """
        super().__init__()
        self.pyramid = pyramid
        self.mapper = mapper
        self.flip_channels = flip_channels
        self.loss_weights = {"loss_mask": mask_loss_weight, "loss_score": score_loss_weight}

    @classmethod
    def from_config(cls, cfg):
        return {
            "pyramid": ImagePyramid(cfg),
            "mapper": PatchMapper(cfg, category_weights={}),
            "flip_channels": cfg.INPUT.FORMAT != cfg.MODEL.SHARPMASK.FORMAT,
            "mask_loss_weight": cfg.MODEL.SHARPMASK.MASK_LOSS_WEIGHT,
            "score_loss_weight": cfg.MODEL.SHARPMASK.SCORE_LOSS_WEIGHT,
        }

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.pyramid.network.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Union[dict[str, Tensor], list[dict[str, Any]]]:
        """Computes the losses in training; scores and masks of patches, or proposals of full images in evaluation.

        Args:
            batched_inputs: one dict per image, all of one kind: with `patches` and their targets, as `PatchMapper` returns them; or with
                `image` (3, H, W) in 0..255 and, in training, `instances` with masks, as Detectron2's mapper returns them.

        Returns:
            In training, a dict of losses. In evaluation, one dict per image: for patches, `scores` (P,) and `masks` (P, M, M), logits with
            one cell per pixel of the window; for images, `proposals`, `Instances` in the frame of the original image, whose size is
            `height` and `width` of the input.
        """
        self.check_not_traced()
        if self.training:
            return self._losses(batched_inputs)
        if "patches" in batched_inputs[0]:
            return self._patch_outputs(batched_inputs)
        outputs: list[Any] = [None] * len(batched_inputs)
        for numbers in _by_size(batched_inputs):
            for number, proposals in zip(numbers, self._proposals([batched_inputs[number] for number in numbers])):
                outputs[number] = {"proposals": proposals}
        return outputs

    def _losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        if "patches" not in batched_inputs[0]:
            # The seeds come from torch, whose random numbers Detectron2 seeds.
            seeds = image_seeds(len(batched_inputs), self.device)
            batched_inputs = [
                self.mapper.cut_instances(x["image"], x["instances"], np.random.default_rng(seed))
                for x, seed in zip(batched_inputs, seeds)
            ]
        scores, masks = self._forward_patches(batched_inputs)
        targets, labels, in_mask_loss, in_score_loss = (
            torch.cat([x[key] for x in batched_inputs]).to(self.device)
            for key in ("masks", "labels", "in_mask_loss", "in_score_loss")
        )
        masks = self._resize_masks(masks, targets.shape[-1])
        losses = {"loss_mask": mask_loss(masks, targets, in_mask_loss)}
        if not self.pyramid.network.freeze_feedforward:
            losses["loss_score"] = score_loss(scores, labels, in_score_loss)
        self._log(scores, masks, targets, labels, in_mask_loss, in_score_loss)
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    @torch.no_grad()
    def _log(
        self,
        scores: Tensor,
        masks: Tensor,
        targets: Tensor,
        labels: Tensor,
        in_mask_loss: Tensor,
        in_score_loss: Tensor,
    ) -> None:
        storage = get_event_storage()
        if in_mask_loss.any():
            storage.put_scalar("patch_iou", mask_iou(masks, targets)[in_mask_loss].mean().item())
        if in_score_loss.any():
            storage.put_scalar("score_accuracy", ((scores > 0) == (labels > 0))[in_score_loss].float().mean().item())

    def _forward_patches(self, batched_inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Scores (B,) and masks (B, M, M) of the patches of all images."""
        patches = torch.cat([x["patches"] for x in batched_inputs]).to(self.device).float()
        patches = patches.flip(1) if self.flip_channels else patches
        return self.pyramid.network(patches.contiguous(memory_format=torch.channels_last))

    def _resize_masks(self, masks: Tensor, size: int) -> Tensor:
        return resize(masks[:, None], (size, size), self.pyramid.network.resizing)[:, 0]

    def _patch_outputs(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        scores, masks = self._forward_patches(batched_inputs)
        masks = self._resize_masks(masks, self.pyramid.network.window_size)
        counts = [len(x["patches"]) for x in batched_inputs]
        return [{"scores": s, "masks": m} for s, m in zip(scores.split(counts), masks.split(counts))]

    def _proposals(self, batched_inputs: list[dict[str, Any]]) -> list[Instances]:
        """One `Instances` per image, of images of one size."""
        images = torch.stack([inputs["image"].to(self.device) for inputs in batched_inputs])
        found = self.pyramid(images.flip(1) if self.flip_channels else images)
        return [
            rescale_proposals(x, inputs.get("height"), inputs.get("width")) for x, inputs in zip(found, batched_inputs)
        ]


def _by_size(batched_inputs: list[dict[str, Any]]) -> list[list[int]]:
    """Indices of the images of each size."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for number, inputs in enumerate(batched_inputs):
        by_size.setdefault(tuple(inputs["image"].shape), []).append(number)
    return list(by_size.values())


@META_ARCH_REGISTRY.register()
class SegmentProposalNetwork(NotExportable, ProposalNetwork):
    """A backbone and SharpMaskFPN, without a detector (MODEL.META_ARCHITECTURE: SegmentProposalNetwork).

    It is Detectron2's ProposalNetwork with masks.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Union[dict[str, Tensor], list[dict[str, Instances]]]:
        """Computes the losses in training, and the proposals of images in evaluation.

        Args:
            batched_inputs: one dict per image, as Detectron2's mapper returns them, with `image` (3, H, W) in 0..255 and, in training,
                `instances` with masks.

        Returns:
            In training, a dict of losses. In evaluation, one dict per image with `proposals`, `Instances` in the frame of the original
            image, whose size is `height` and `width` of the input.

        Raises:
            UserError: training of a frozen generator, or without masks.
        """
        self.check_not_traced()
        if self.training:
            if self.proposal_generator.frozen:
                raise UserError(
                    "MODEL.SHARPMASK.GENERATOR.FROZEN is True: alone, without a detector, there is nothing left to train; set it to False"
                )
            instances = [inputs["instances"].to(self.device) for inputs in batched_inputs]
            return self.proposal_generator.losses(self.encode(batched_inputs), instances)
        # Images of different sizes are not batched, because their padding would change the features at the borders.
        outputs: list[Any] = [None] * len(batched_inputs)
        for numbers in _by_size(batched_inputs):
            inputs = [batched_inputs[number] for number in numbers]
            features = self.encode(inputs)
            originals = [
                (x.get("height") or height, x.get("width") or width)
                for x, (height, width) in zip(inputs, features.image_sizes)
            ]
            for number, proposals in zip(numbers, self.proposal_generator.propose(features, originals)):
                outputs[number] = {"proposals": proposals}
        return outputs

    def encode(self, batched_inputs: list[dict[str, Any]]) -> PyramidFeatures:
        """Computes, once per batch of images, what all windows of the images share: see `SharpMaskFPN.encode`.

        Args:
            batched_inputs: see `forward`.
        """
        pixels = [(inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std for inputs in batched_inputs]
        images = ImageList.from_tensors(pixels, self.backbone.size_divisibility)
        features = self.backbone(images.tensor.contiguous(memory_format=torch.channels_last))
        return self.proposal_generator.encode(images.image_sizes, features)
