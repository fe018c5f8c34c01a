"""A trunk and a bidirectional feature pyramid on it (BiFPN: EfficientDet, arXiv 1911.09070, section 3), with a level of stride 4 below it.

Shape letters: B images, C channels of the pyramid, Y X cells of a level.
"""

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ...errors import UserError

# Levels p3 to p7 of a cell by their place in a list.
_COARSEST = 4


class SeparableNode(nn.Module):
    """A node of a BiFPN cell: the sum of its inputs through ReLU6, a depthwise 3x3 convolution and a 1x1 convolution."""

    def __init__(self, channels: int):
        """
        Args:
            channels: C, of the inputs and of the output.
        """
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps (B, C, Y, X) of one size to a map (B, C, Y, X)."""
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return self.pointwise(self.depthwise(F.relu6(total)))


class BiFPNCell(nn.ModuleList):
    """One pass from the coarsest level to the finest and back.

    Nodes 0 to 3 make p6 to p3 top-down, nodes 4 to 7 make p4 to p7 bottom-up.
    """

    def __init__(self, channels: int):
        """
        Args:
            channels: C.
        """
        super().__init__(SeparableNode(channels) for _ in range(2 * _COARSEST))

    def forward(self, top_down: list, bottom_up: list) -> list:
        """
        Args:
            top_down: five maps (B, C, Y, X), p3 to p7, that the nodes of the first pass read.
            bottom_up: five maps of these sizes that the nodes of the second pass read; those of p3 and p7 are not read.

        Returns:
            five maps (B, C, Y, X), p3 to p7.
        """
        merged = [*top_down[:_COARSEST], top_down[_COARSEST]]
        for number, level in enumerate(range(_COARSEST - 1, -1, -1)):
            merged[level] = self[number](top_down[level], _doubled(merged[level + 1], top_down[level]))
        outputs = [merged[0]]
        for level in range(1, _COARSEST):
            outputs.append(self[3 + level](bottom_up[level], merged[level], halved(outputs[-1])))
        outputs.append(self[7](top_down[_COARSEST], halved(outputs[-1])))
        return outputs


class BiFPN(nn.Module):
    """Features of strides 8, 16 and 32 to a pyramid p3 to p7 of `num_cells` BiFPN cells.

    The first cell has two inputs for p4 and for p5, one for each of its passes.
    """

    def __init__(self, *, in_channels: list, channels: int, num_cells: int):
        """
        Args:
            in_channels: of the features of strides 8, 16 and 32.
            channels: C of every level.
            num_cells: passes down and up.

        Raises:
            ValueError: no cell.
        """
        super().__init__()
        if num_cells < 1:
            raise UserError(f"MODEL.BIFPN.NUM_CELLS is {num_cells}: at least one cell is needed")
        s8, s16, s32 = in_channels
        # Named by the level and by the node of the first cell that reads it.
        sources = {"p3_node3": s8, "p4_node2": s16, "p4_node4": s16, "p5_node1": s32, "p5_node5": s32, "p6": s32}
        self.inputs = nn.ModuleDict({name: nn.Conv2d(source, channels, 1) for name, source in sources.items()})
        self.cells = nn.ModuleList(BiFPNCell(channels) for _ in range(num_cells))

    def forward(self, s8: Tensor, s16: Tensor, s32: Tensor) -> list:
        """Maps of strides 8, 16, 32 whose sides double exactly to five maps (B, C, Y, X), p3 to p7."""
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
    """(B, C, Y, X) to half its size, rounded up: 3x3 max pooling of stride 2 with TensorFlow's "SAME" padding."""
    bottom, right = (1 - side % 2 for side in x.shape[2:])
    # An odd side has its padding before its first cell and after its last.
    return F.max_pool2d(F.pad(x, (1 - right, 1, 1 - bottom, 1), value=-torch.inf), 3, stride=2)


def _doubled(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


class BiFPNBackbone(Backbone):
    """Features p2 to p7 of strides 4 to 128: a BiFPN, and p2 made of p3 and the trunk's feature of stride 4."""

    def __init__(self, *, trunk: Backbone, channels: int, num_cells: int):
        """
        Args:
            trunk: gives the features s4, s8, s16 and s32.
            channels: C.
            num_cells: see `BiFPN`.

        Raises:
            ValueError: a trunk without one of these features.
        """
        super().__init__()
        shapes = trunk.output_shape()
        if missing := [name for name in ("s4", "s8", "s16", "s32") if name not in shapes]:
            raise UserError(f"MODEL.TIMM.OUT_FEATURES: a BiFPN needs {missing}, the trunk gives {list(shapes)}")
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
        # All levels then have even sides but the last, so that every cell covers the same part of the image as in training.
        return 128

    def forward(self, x: Tensor) -> dict:
        """Normalised images (B, 3, H, W), sides multiples of 128, to p2 to p7 and the features of the trunk."""
        features = self.trunk(x)
        levels = self.bifpn(features["s8"], features["s16"], features["s32"])
        lateral = self.lateral(features["s4"])
        p2 = self.finest(F.relu(lateral + _doubled(levels[0], lateral)))
        return {**features, "p2": p2, **{f"p{i}": level for i, level in enumerate(levels, start=3)}}

    def output_shape(self) -> dict:
        return {**self.trunk.output_shape(), **self._shapes}


def load_pyramid(bifpn: BiFPN, path: str) -> None:
    """Load the arrays `bifpn.*` of an .npz file into a BiFPN.

    Raises:
        ValueError: arrays that are missing or do not fit; the message names the file and the first of them.
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
            f"MODEL.TIMM.PRETRAINED: {path} does not fit at bifpn.{wrong[0]}; see MODEL.BIFPN.NUM_CELLS and CHANNELS"
        )
    bifpn.load_state_dict(weights)


@BACKBONE_REGISTRY.register()
def build_timm_bifpn_backbone(cfg, input_shape: ShapeSpec) -> BiFPNBackbone:
    """A timm trunk from MODEL.TIMM and a BiFPN from MODEL.BIFPN on it, whose weights come from the trunk's file where that has them."""
    from .detector import build_timm_backbone

    backbone = BiFPNBackbone(
        trunk=build_timm_backbone(cfg, input_shape),
        channels=cfg.MODEL.BIFPN.CHANNELS,
        num_cells=cfg.MODEL.BIFPN.NUM_CELLS,
    )
    if cfg.MODEL.TIMM.PRETRAINED.endswith(".npz"):
        load_pyramid(backbone.bifpn, cfg.MODEL.TIMM.PRETRAINED)
    if cfg.MODEL.BIFPN.FROZEN:
        backbone.bifpn.requires_grad_(False)
    return backbone
