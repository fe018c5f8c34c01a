"""VGG trunk: torchvision's convolutions without batch norm and without the last pooling."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ...errors import UserError
from ..layers import use_mirrored_padding
from .features import trunk_features

_STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5"]


class VGGTrunk(Backbone):
    """VGG-A (DeepMask's original trunk) or VGG-D (VGG-16), with the features `conv1` (stride 1) .. `conv5` (stride 16).

    A feature is what the following pooling reads. Parameters have torchvision's names (`features.0.weight`), so its ImageNet
    checkpoints load.
    """

    def __init__(self, *, variant: str, padding: str, out_features: list, freeze_at: int = 0):
        """
        Args:
            variant: "A" or "D".
            padding: "mirrored" or "zeros".
            out_features: names to return; layers beyond the last of them are not built.
            freeze_at: stages that are not trained.

        Raises:
            ValueError: unknown variant, feature or padding.
        """
        super().__init__()
        from torchvision.models import vgg

        builders = {"A": vgg.vgg11, "D": vgg.vgg16}
        if variant not in builders:
            raise UserError(f"MODEL.SHARPMASK.TRUNK.VGG is {variant!r}: choose 'A' or 'D'")
        if unknown := set(out_features) - set(_STAGES):
            raise UserError(f"VGG has no feature {sorted(unknown)}: choose from {_STAGES}")
        if padding not in ("mirrored", "zeros"):
            raise UserError(f"MODEL.SHARPMASK.TRUNK.PADDING is {padding!r}: choose 'mirrored' or 'zeros'")
        last = max(_STAGES.index(name) for name in out_features)
        layers = list(builders[variant](weights=None, init_weights=True).features)
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        self.features = nn.Sequential(*layers[: pools[last]])
        self._ends = {name: end - 1 for name, end in zip(_STAGES, pools)}
        self._out_features = list(out_features)
        self._out_feature_strides = {name: 2**i for i, name in enumerate(_STAGES)}
        # Each pooling follows a convolution and its ReLU.
        self._out_feature_channels = {name: layers[end - 2].out_channels for name, end in zip(_STAGES, pools)}
        if freeze_at:
            self.features[: pools[freeze_at - 1]].requires_grad_(False)
        if padding == "mirrored":
            use_mirrored_padding(self)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides[name] for name in self._out_features)

    def forward(self, x: Tensor) -> dict:
        """Features of normalised images (B, 3, H, W): a dict of (B, C, H / stride, W / stride)."""
        outputs = {}
        ends = {end: name for name, end in self._ends.items()}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in ends:
                outputs[ends[i]] = x
        return {name: outputs[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_vgg_trunk(cfg, input_shape: ShapeSpec) -> VGGTrunk:
    """A VGG trunk from MODEL.SHARPMASK.TRUNK."""
    trunk = cfg.MODEL.SHARPMASK.TRUNK
    return VGGTrunk(
        variant=trunk.VGG, padding=trunk.PADDING, out_features=trunk_features(cfg), freeze_at=trunk.FREEZE_AT
    )
