"""ResNet trunk: Detectron2's ResNet with the feature of stride 2 as an additional output.

Shape letters:
    B: images
    C: channels of a feature
    H, W: image height and width in pixels
"""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from ...errors import UserError
from ..layers import use_mirrored_padding
from .features import trunk_features

_CONV1 = "conv1"


class ResNetTrunk(ResNet):
    """Detectron2's ResNet with the features `conv1` (stride 2, 64 channels) and `res2` to `res5`.

    `conv1` is the output of the first convolution after ReLU, before the max pooling. The parameters have Detectron2's names, so that its
    ImageNet checkpoints can be loaded.
    """

    def __init__(
        self,
        *,
        depth: int,
        stride_in_1x1: bool,
        norm: str,
        padding: str,
        out_features: Sequence[str],
        freeze_at: int = 0,
    ):
        """
        Args:
            depth: number of layers: 18, 34, 50, 101 or 152.
            stride_in_1x1: place the stride of bottleneck blocks in the 1x1 convolution instead of the 3x3 convolution; ignored if `depth`
                is below 50.
            norm: a norm of Detectron2, such as "FrozenBN" or "BN".
            padding: "mirrored" or "zeros", padding of convolutions. As in the released code, the max pooling is not mirrored.
            out_features: names of the returned features. Stages after the last of them are not built.
            freeze_at: number of stages whose parameters are not trained, counted from the stem. Default: 0.

        Raises:
            UserError: the depth, a feature or the padding is unknown.
        """
        names = [_CONV1, "res2", "res3", "res4", "res5"]
        if unknown := set(out_features) - set(names):
            raise UserError(f"ResNet has no feature {sorted(unknown)}: choose from {names}")
        if depth not in (18, 34, 50, 101, 152):
            raise UserError(f"MODEL.SHARPMASK.TRUNK.RESNET_DEPTH is {depth}: choose 18, 34, 50, 101 or 152")
        if padding not in ("mirrored", "zeros"):
            raise UserError(f"MODEL.SHARPMASK.TRUNK.PADDING is {padding!r}: choose 'mirrored' or 'zeros'")
        options = {"stride_in_1x1": stride_in_1x1} if depth >= 50 else {}
        num_stages = max(names.index(name) for name in out_features)
        stages = ResNet.make_default_stages(depth, norm=norm, **options)[: max(num_stages, 1)]
        stem = BasicStem(3, 64, norm)
        stem.conv1.activation = nn.ReLU(inplace=True)
        super().__init__(stem, stages, out_features=[f for f in out_features if f != _CONV1] or ["res2"])
        self._out_features = list(out_features)
        self._out_feature_strides[_CONV1] = 2
        self._out_feature_channels[_CONV1] = self.stem.conv1.out_channels
        self.freeze(freeze_at)
        if padding == "mirrored":
            use_mirrored_padding(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features.

        Args:
            x: normalised images (B, 3, H, W).

        Returns:
            Feature maps (B, C, H / stride, W / stride) by name.
        """
        x = self.stem.conv1(x)
        outputs = {_CONV1: x}
        x = max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for name, stage in zip(self.stage_names, self.stages):
            x = outputs[name] = stage(x)
        return {name: outputs[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_resnet_trunk(cfg: CfgNode, input_shape: ShapeSpec) -> ResNetTrunk:
    """Build a ResNet trunk for the image pyramid.

    Args:
        cfg: config; `MODEL.SHARPMASK.TRUNK` and the names of the features in `MODEL.SHARPMASK` are read.
        input_shape: shape of the input; unused, because images have three channels.

    Returns:
        The trunk.

    Raises:
        UserError: see `ResNetTrunk`.
    """
    trunk = cfg.MODEL.SHARPMASK.TRUNK
    return ResNetTrunk(
        depth=trunk.RESNET_DEPTH,
        stride_in_1x1=trunk.STRIDE_IN_1X1,
        norm=trunk.NORM,
        padding=trunk.PADDING,
        out_features=trunk_features(cfg),
        freeze_at=trunk.FREEZE_AT,
    )
