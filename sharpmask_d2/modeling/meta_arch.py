"""The stand-alone networks: one is trained on patches, the other on full images; both give proposals at test time.

Shape letters: B patches of all images, P patches of an image, M mask side.
"""

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.rcnn import ProposalNetwork
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor

from ..data.patch_mapper import PatchMapper
from ..errors import UserError
from ..structures import rescale_proposals
from .exporting import NotExportable
from .image_pyramid.resizing import resize
from .losses import mask_iou, mask_loss, score_loss
from .proposal_generator import ImagePyramid
from .proposal_generator.sharpmask_fpn import PyramidFeatures

# Values of MODEL.META_ARCHITECTURE of the stand-alone networks: trained on patches, or on full images.
ARCHITECTURE = "SharpMaskProposalNetwork"
ALONE = (ARCHITECTURE, "SegmentProposalNetwork")


@META_ARCH_REGISTRY.register()
class SharpMaskProposalNetwork(NotExportable):
    """DeepMask or SharpMask alone (MODEL.META_ARCHITECTURE: SharpMaskProposalNetwork)."""

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
            pyramid: holds the network and makes proposals of full images.
            mapper: cuts patches out of full training images, for loaders that are not ours.
            flip_channels: the input's channel order is not the network's.
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
        return self.pyramid.network.device

    def forward(self, batched_inputs: list):
        """
        Args:
            batched_inputs: a dict per image, of one kind: with `patches` and targets as `PatchMapper` makes them; or with `image`
                (3, H, W) in 0..255 and, in training, `instances` with masks, as Detectron2's mapper makes them.

        Returns:
            in training, a dict of losses. Else a dict per image: for patches, `scores` (P,) and `masks` (P, M, M), logits at the window's
            size; for images, `proposals`, Instances in the frame of the original image (`height`, `width` there).
        """
        self.check_not_traced()
        if self.training:
            return self._losses(batched_inputs)
        if "patches" in batched_inputs[0]:
            return self._patch_outputs(batched_inputs)
        outputs = [None] * len(batched_inputs)
        for numbers in _by_size(batched_inputs):
            for number, proposals in zip(numbers, self._proposals([batched_inputs[number] for number in numbers])):
                outputs[number] = {"proposals": proposals}
        return outputs

    def _losses(self, batched_inputs: list) -> dict:
        if "patches" not in batched_inputs[0]:
            # Seeded from torch, which Detectron2 seeds.
            rng = np.random.default_rng(torch.randint(2**62, (1,)).item())
            batched_inputs = [self.mapper.cut_instances(x["image"], x["instances"], rng) for x in batched_inputs]
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
    def _log(self, scores, masks, targets, labels, in_mask_loss, in_score_loss) -> None:
        storage = get_event_storage()
        if in_mask_loss.any():
            storage.put_scalar("patch_iou", mask_iou(masks, targets)[in_mask_loss].mean().item())
        if in_score_loss.any():
            storage.put_scalar("score_accuracy", ((scores > 0) == (labels > 0))[in_score_loss].float().mean().item())

    def _forward_patches(self, batched_inputs: list) -> tuple:
        patches = torch.cat([x["patches"] for x in batched_inputs]).to(self.device).float()
        patches = patches.flip(1) if self.flip_channels else patches
        return self.pyramid.network(patches.contiguous(memory_format=torch.channels_last))

    def _resize_masks(self, masks: Tensor, size: int) -> Tensor:
        return resize(masks[:, None], (size, size), self.pyramid.network.resizing)[:, 0]

    def _patch_outputs(self, batched_inputs: list) -> list:
        scores, masks = self._forward_patches(batched_inputs)
        masks = self._resize_masks(masks, self.pyramid.network.window_size)
        counts = [len(x["patches"]) for x in batched_inputs]
        return [{"scores": s, "masks": m} for s, m in zip(scores.split(counts), masks.split(counts))]

    def _proposals(self, batched_inputs: list) -> list:
        images = torch.stack([inputs["image"].to(self.device) for inputs in batched_inputs])
        found = self.pyramid(images.flip(1) if self.flip_channels else images)
        return [
            rescale_proposals(x, inputs.get("height"), inputs.get("width")) for x, inputs in zip(found, batched_inputs)
        ]


def _by_size(batched_inputs: list) -> list:
    """Numbers of the images of each size."""
    by_size = {}
    for number, inputs in enumerate(batched_inputs):
        by_size.setdefault(tuple(inputs["image"].shape), []).append(number)
    return list(by_size.values())


@META_ARCH_REGISTRY.register()
class SegmentProposalNetwork(NotExportable, ProposalNetwork):
    """A backbone and SharpMaskFPN alone (MODEL.META_ARCHITECTURE: SegmentProposalNetwork): Detectron2's ProposalNetwork with masks."""

    def forward(self, batched_inputs: list):
        """
        Args:
            batched_inputs: a dict per image, as Detectron2's mapper makes them: `image` (3, H, W) in 0..255, in training `instances` with
                masks.

        Returns:
            in training, a dict of losses. Else a dict per image: `proposals`, Instances in the frame of the original image (`height`,
            `width` of the dict).
        """
        self.check_not_traced()
        if self.training:
            if self.proposal_generator.frozen:
                raise UserError(
                    "MODEL.SHARPMASK.GENERATOR.FROZEN is True: alone, without a detector, there is nothing left to train; set it to False"
                )
            instances = [inputs["instances"].to(self.device) for inputs in batched_inputs]
            return self.proposal_generator.losses(self.encode(batched_inputs), instances)
        # Padding to the size of another image would reach into the features: images of one size go together.
        outputs = [None] * len(batched_inputs)
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

    def encode(self, batched_inputs: list) -> PyramidFeatures:
        """Computes, once per batch of images, what all windows of the images share: see `SharpMaskFPN.encode`.

        Args:
            batched_inputs: see `forward`.
        """
        pixels = [(inputs["image"].to(self.device) - self.pixel_mean) / self.pixel_std for inputs in batched_inputs]
        images = ImageList.from_tensors(pixels, self.backbone.size_divisibility)
        features = self.backbone(images.tensor.contiguous(memory_format=torch.channels_last))
        return self.proposal_generator.encode(images.image_sizes, features)
