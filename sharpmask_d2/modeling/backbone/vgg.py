"""VGG trunk: the convolutions of torchvision's VGG without batch norm and without the last pooling.

Shape letters:
    B: images
    C: channels of a feature
    H, W: image height and width in pixels
"""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ...errors import UserError
from ..layers import use_mirrored_padding
from .features import trunk_features

_STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5"]


class VGGTrunk(Backbone):
    """VGG-A (the trunk of the DeepMask paper) or VGG-D (VGG-16), with the features `conv1` (stride 1) to `conv5` (stride 16).

    Each feature is the output of a stage before its pooling. The parameters have torchvision's names (`features.0.weight`), so that its
    ImageNet checkpoints can be loaded.
    """

    def __init__(self, *, variant: str, padding: str, out_features: Sequence[str], freeze_at: int = 0):
        """
        Args:
            variant: "A" or "D".
            padding: "mirrored" or "zeros", padding of convolutions.
            out_features: names of the returned features. Layers after the last of them are not built.
            freeze_at: number of stages, from the finest, whose parameters are not trained. Default: 0.

        Raises:
            UserError: the variant, a feature or the padding is unknown.
        """
        super().__init__()
        from torchvision.models import vgg

        if variant not in ("A", "D"):
            raise UserError(f"MODEL.SHARPMASK.TRUNK.VGG is {variant!r}: choose 'A' or 'D'")
        if unknown := set(out_features) - set(_STAGES):
            raise UserError(f"VGG has no feature {sorted(unknown)}: choose from {_STAGES}")
        if padding not in ("mirrored", "zeros"):
            raise UserError(f"MODEL.SHARPMASK.TRUNK.PADDING is {padding!r}: choose 'mirrored' or 'zeros'")
        last = max(_STAGES.index(name) for name in out_features)
        layers = list(vgg.make_layers(vgg.cfgs[variant], batch_norm=False))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                # Torchvision's initialisation. Its whole VGG would also allocate 120 million parameters of fully connected layers.
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        self.features = nn.Sequential(*layers[: pools[last]])
        self._ends = {name: end - 1 for name, end in zip(_STAGES, pools)}
        self._out_features = list(out_features)
        self._out_feature_strides = {name: 2**i for i, name in enumerate(_STAGES)}
        # Before each pooling there are a convolution and its ReLU.
        self._out_feature_channels = {name: layers[end - 2].out_channels for name, end in zip(_STAGES, pools)}
        if freeze_at:
            self.features[: pools[freeze_at - 1]].requires_grad_(False)
        if padding == "mirrored":
            use_mirrored_padding(self)

    @property
    def size_divisibility(self) -> int:
        """Divisor of the sides of images: the largest stride of the returned features."""
        return max(self._out_feature_strides[name] for name in self._out_features)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features.

        Args:
            x: normalised images (B, 3, H, W).

        Returns:
            Feature maps (B, C, H / stride, W / stride) by name.
        """
        outputs = {}
        ends = {end: name for name, end in self._ends.items()}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in ends:
                outputs[ends[i]] = x
        return {name: outputs[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_vgg_trunk(cfg: CfgNode, input_shape: ShapeSpec) -> VGGTrunk:
    """Build a VGG trunk for the image pyramid.

    Args:
        cfg: config; `MODEL.SHARPMASK.TRUNK` and the names of the features in `MODEL.SHARPMASK` are read.
        input_shape: shape of the input; unused, because images have three channels.

    Returns:
        The trunk.

    Raises:
        UserError: see `VGGTrunk`.
    """
    trunk = cfg.MODEL.SHARPMASK.TRUNK
    return VGGTrunk(
        variant=trunk.VGG, padding=trunk.PADDING, out_features=trunk_features(cfg), freeze_at=trunk.FREEZE_AT
    )
