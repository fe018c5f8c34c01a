"""A trunk with a bidirectional feature pyramid (BiFPN: EfficientDet, arXiv 1911.09070, section 3) and an additional level of stride 4.

Shape letters:
    B: images
    C: channels of the pyramid
    Y, X: height and width of a level in cells
    H, W: image height and width in pixels
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ...errors import UserError

# Index of p7 in the list of levels p3 to p7.
_COARSEST = 4


class SeparableNode(nn.Module):
    """A node of a BiFPN cell: the sum of its inputs through ReLU6, a depthwise 3x3 convolution and a 1x1 convolution."""

    def __init__(self, channels: int):
        """
        Args:
            channels: C, number of channels of inputs and output.
        """
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Merge feature maps.

        Args:
            inputs: one or more maps (B, C, Y, X) of equal size.

        Returns:
            (B, C, Y, X).
        """
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return self.pointwise(self.depthwise(F.relu6(total)))


class BiFPNCell(nn.ModuleList):
    """A cell of a BiFPN: one top-down pass, from the coarsest level to the finest, and one bottom-up pass back.

    Nodes 0 to 3 compute p6 to p3 top-down, nodes 4 to 7 compute p4 to p7 bottom-up.
    """

    def __init__(self, channels: int):
        """
        Args:
            channels: C, number of channels of all levels.
        """
        super().__init__(SeparableNode(channels) for _ in range(2 * _COARSEST))

    def forward(self, top_down: list[Tensor], bottom_up: list[Tensor]) -> list[Tensor]:
        """Run both passes.

        Args:
            top_down: inputs of the top-down pass, five maps (B, C, Y, X), p3 to p7.
            bottom_up: inputs of the bottom-up pass, five maps of the same sizes; those of p3 and p7 are ignored.

        Returns:
            Five maps (B, C, Y, X), p3 to p7.
        """
        merged = [*top_down[:_COARSEST], top_down[_COARSEST]]
        for number, level in enumerate(range(_COARSEST - 1, -1, -1)):
            merged[level] = self[number](top_down[level], _upsample(merged[level + 1], top_down[level]))
        outputs = [merged[0]]
        for level in range(1, _COARSEST):
            outputs.append(self[3 + level](bottom_up[level], merged[level], halved(outputs[-1])))
        outputs.append(self[7](top_down[_COARSEST], halved(outputs[-1])))
        return outputs


class BiFPN(nn.Module):
    """Computes a feature pyramid p3 to p7 from features of strides 8, 16 and 32, by a sequence of BiFPN cells.

    The first cell has separate inputs for its two passes at p4 and p5, as in EfficientDet.
    """

    def __init__(self, *, in_channels: Sequence[int], channels: int, num_cells: int):
        """
        Args:
            in_channels: numbers of channels of the features of strides 8, 16 and 32.
            channels: C, number of channels of all levels.
            num_cells: number of cells, at least 1.

        Raises:
            UserError: `num_cells` is less than 1.
        """
        super().__init__()
        if num_cells < 1:
            raise UserError(f"MODEL.BIFPN.NUM_CELLS is {num_cells}: set it to at least 1")
        s8, s16, s32 = in_channels
        # The names give the level and the node of the first cell that uses the input.
        sources = {"p3_node3": s8, "p4_node2": s16, "p4_node4": s16, "p5_node1": s32, "p5_node5": s32, "p6": s32}
        self.inputs = nn.ModuleDict({name: nn.Conv2d(source, channels, 1) for name, source in sources.items()})
        self.cells = nn.ModuleList(BiFPNCell(channels) for _ in range(num_cells))

    def forward(self, s8: Tensor, s16: Tensor, s32: Tensor) -> list[Tensor]:
        """Compute all levels.

        Args:
            s8: (B, channels, H / 8, W / 8).
            s16: (B, channels, H / 16, W / 16).
            s32: (B, channels, H / 32, W / 32).

        Returns:
            Five maps (B, C, Y, X), p3 to p7. Sides of p6 and p7 are rounded up.
        """
        inputs = self.inputs
        p3, p6 = inputs["p3_node3"](s8), halved(inputs["p6"](s32))
        p7 = halved(p6)
        top_down = [p3, inputs["p4_node2"](s16), inputs["p5_node1"](s32), p6, p7]
        bottom_up = [p3, inputs["p4_node4"](s16), inputs["p5_node5"](s32), p6, p7]
        levels = self.cells[0](top_down, bottom_up)
        for cell in self.cells[1:]:
            levels = cell(levels, levels)
        return levels


def halved(x: Tensor) -> Tensor:
    """Halve a feature map by 3x3 max pooling of stride 2 with TensorFlow's "SAME" padding.

    Args:
        x: (B, C, Y, X).

    Returns:
        (B, C, Y / 2, X / 2), rounded up.
    """
    bottom, right = (1 - side % 2 for side in x.shape[2:])
    # "SAME" pads an odd side by one cell at both ends, and an even side by one cell at its end.
    return F.max_pool2d(F.pad(x, (1 - right, 1, 1 - bottom, 1), value=-torch.inf), 3, stride=2)


def _upsample(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


class BiFPNBackbone(Backbone):
    """Computes the features p2 to p7 of strides 4 to 128: p3 to p7 by a BiFPN, and p2 from p3 and the trunk's feature of stride 4."""

    def __init__(self, *, trunk: Backbone, channels: int, num_cells: int):
        """
        Args:
            trunk: a trunk with the features s4, s8, s16 and s32.
            channels: C, number of channels of all levels.
            num_cells: number of BiFPN cells, at least 1.

        Raises:
            UserError: the trunk lacks one of these features, or `num_cells` is less than 1.
        """
        super().__init__()
        shapes = trunk.output_shape()
        if missing := [name for name in ("s4", "s8", "s16", "s32") if name not in shapes]:
            raise UserError(f"MODEL.TIMM.OUT_FEATURES is {list(shapes)}: add {missing}, which a BiFPN needs")
        self.trunk = trunk
        self.bifpn = BiFPN(
            in_channels=[shapes[name].channels for name in ("s8", "s16", "s32")],
            channels=channels,
            num_cells=num_cells,
        )
        self.lateral = nn.Conv2d(shapes["s4"].channels, channels, 1)
        self.finest = nn.Conv2d(channels, channels, 3, padding=1)
        strides = [4, 8, 16, 32, 64, 128]
        self._shapes = {
            f"p{i}": ShapeSpec(channels=channels, stride=stride) for i, stride in enumerate(strides, start=2)
        }

    @property
    def size_divisibility(self) -> int:
        """Divisor of the sides of images: at 128 all levels except the last have even sides, so that no padding shifts their cells."""
        return 128

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute all features.

        Args:
            x: normalised images (B, 3, H, W); H and W are multiples of 128.

        Returns:
            p2 to p7, (B, C, Y, X), and the features of the trunk, by name.
        """
        features = self.trunk(x)
        levels = self.bifpn(features["s8"], features["s16"], features["s32"])
        lateral = self.lateral(features["s4"])
        p2 = self.finest(F.relu(lateral + _upsample(levels[0], lateral)))
        return {**features, "p2": p2, **{f"p{i}": level for i, level in enumerate(levels, start=3)}}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides of the features, by name."""
        return {**self.trunk.output_shape(), **self._shapes}


def load_pyramid(bifpn: BiFPN, path: str) -> None:
    """Load the weights of a BiFPN from an .npz file.

    Args:
        bifpn: the BiFPN, which is changed in place.
        path: path of a file with the arrays `bifpn.*`; other arrays are ignored.

    Raises:
        UserError: an array is missing, superfluous, or of another shape. The message names the file and the first such array.
    """
    with np.load(path) as arrays:
        weights = {
            k.removeprefix("bifpn."): torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith("bifpn.")
        }
    own = bifpn.state_dict()
    wrong = [
        name
        for name in sorted(own.keys() | weights.keys())
        if getattr(weights.get(name), "shape", None) != getattr(own.get(name), "shape", None)
    ]
    if wrong:
        raise UserError(
            f"MODEL.TIMM.PRETRAINED: {path} does not fit the BiFPN at bifpn.{wrong[0]}: change MODEL.BIFPN.NUM_CELLS or CHANNELS"
        )
    bifpn.load_state_dict(weights)


@BACKBONE_REGISTRY.register()
def build_timm_bifpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BiFPNBackbone:
    """Build a timm trunk with a BiFPN. If `MODEL.TIMM.PRETRAINED` is an .npz file, it contains the weights of both.

    Args:
        cfg: config; `MODEL.TIMM`, `MODEL.BIFPN` and `MODEL.BACKBONE.FREEZE_AT` are read.
        input_shape: shape of the input; unused, because images have three channels.

    Returns:
        The backbone.

    Raises:
        UserError: see `BiFPNBackbone`, `TimmTrunk` and `load_pyramid`.
    """
    from .detector import build_timm_backbone

    backbone = BiFPNBackbone(
        trunk=build_timm_backbone(cfg, input_shape),
        channels=cfg.MODEL.BIFPN.CHANNELS,
        num_cells=cfg.MODEL.BIFPN.NUM_CELLS,
    )
    from_arrays = cfg.MODEL.TIMM.PRETRAINED.endswith(".npz")
    if from_arrays:
        load_pyramid(backbone.bifpn, cfg.MODEL.TIMM.PRETRAINED)
    if cfg.MODEL.BIFPN.FROZEN:
        # An .npz file has no weights of level p2, which has to be trained then.
        for module in [backbone.bifpn] if from_arrays else [backbone.bifpn, backbone.lateral, backbone.finest]:
            module.requires_grad_(False)
    return backbone
