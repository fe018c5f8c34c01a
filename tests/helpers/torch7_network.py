"""Runs Torch7's nn modules one by one, as the reader gives them: an independent reference for the networks of this package.

It is slow and literal on purpose. All modules are in evaluation mode. Gradients come from autograd, except that the padded border of
nn.SpatialSymmetricPadding is a constant, as in the released code.

Shape letters: N patches of a batch, H W patch, S side of the mask.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F


class Torch7Network:
    """A module with all that it contains.

    Attributes:
        modules: path -> module of the file; paths are such as "trunk.modules[1].modules[2]".
        outputs: path -> output of the last run.
    """

    def __init__(self, module, path: str, dtype: torch.dtype = torch.float64):
        """
        Args:
            module: TorchObject of an nn module.
            path: of the module in its model, the beginning of all paths.
            dtype: of all computation.

        Raises:
            NotImplementedError: a class of module that is not known here.
        """
        self.root, self.path, self.dtype = module, path, dtype
        self.modules = dict(_walk(module, path))
        self.outputs: dict = {}
        self._tensors: dict = {}
        for place, part in self.modules.items():
            if part.class_name not in _RULES:
                raise NotImplementedError(f"{part.class_name} at {place}")

    def __call__(self, x):
        """Run the network on a tensor, or on a list of tensors for modules that take tables."""
        return self.run(self.root, self.path, x)

    def run(self, module, path: str, x):
        self.outputs[path] = _RULES[module.class_name](self, path, module.fields, x)
        return self.outputs[path]

    def tensor(self, path: str, name: str):
        """A field of a module as a tensor, always the same one; None where it is missing or empty."""
        value = self.modules[path].fields.get(name)
        if value is None or value.size == 0:
            return None
        if (path, name) not in self._tensors:
            tensor = torch.from_numpy(np.array(value, order="C")).to(self.dtype)
            self._tensors[path, name] = tensor.requires_grad_(name in ("weight", "bias"))
        return self._tensors[path, name]

    def gradients(self) -> Iterator[tuple]:
        """(module, "weight" or "bias", gradient as an array of the field's shape) of all parameters; zeros where none was computed."""
        for path, module in self.modules.items():
            for name in ("weight", "bias"):
                if name in module.fields:
                    gradient = self.tensor(path, name).grad
                    yield module, name, np.zeros(module.fields[name].shape) if gradient is None else gradient.numpy()


def _walk(module, path: str) -> Iterator[tuple]:
    yield path, module
    if "modules" in module.fields:
        for i, child in enumerate(module.fields["modules"].sequence(), start=1):
            yield from _walk(child, f"{path}.modules[{i}]")


def _children(network: Torch7Network, path: str) -> Iterator[tuple]:
    """The modules of a container with their paths."""
    for i, child in enumerate(network.modules[path].fields["modules"].sequence(), start=1):
        yield child, f"{path}.modules[{i}]"


def _whole(fields, *names: str) -> list:
    return [int(fields[name]) for name in names]


# ---------------------------------------------------------------------- a rule for each class: network, path, fields, input -> output


def _sequential(network, path, fields, x):
    for child, place in _children(network, path):
        x = network.run(child, place, x)
    return x


def _symmetric_padding(network, path, fields, x):
    left, right, top, bottom = _whole(fields, "pad_l", "pad_r", "pad_t", "pad_b")
    height, width = x.shape[2:]
    padded = x.detach().index_select(2, _mirrored(height, top, bottom)).index_select(3, _mirrored(width, left, right))
    padded[:, :, top : top + height, left : left + width] = x
    return padded


def _mirrored(size: int, before: int, after: int) -> torch.Tensor:
    """Which entries of a line make up the padded line: cba|abc|cba."""
    return torch.tensor([*range(before - 1, -1, -1), *range(size), *range(size - 1, size - 1 - after, -1)])


def _resampling(network, path, fields, x):
    # (N, S, S): Lua counts dimensions from 1.
    assert (fields["mode"], fields["yDim"], fields["xDim"]) == ("bilinear", 2, 3)
    return F.interpolate(x[None], _whole(fields, "oheight", "owidth"), mode="bilinear", align_corners=True)[0]


def _convolution(network, path, fields, x):
    stride, padding = _whole(fields, "dH", "dW"), _whole(fields, "padH", "padW")
    weight = network.tensor(path, "weight").reshape(_whole(fields, "nOutputPlane", "nInputPlane", "kH", "kW"))
    return F.conv2d(x, weight, network.tensor(path, "bias"), stride, padding)


def _affine(network, path, fields, x):
    a, b = (network.tensor(path, name).reshape(1, -1, 1, 1) for name in "ab")
    return a * x + b


def _batch_norm(network, path, fields, x):
    # Older files store the inverse of the deviation as running_std.
    inverse = network.tensor(path, "running_std")
    if inverse is None:
        inverse = 1 / (network.tensor(path, "running_var") + fields["eps"]).sqrt()
    parts = inverse, *(network.tensor(path, name) for name in ("running_mean", "weight", "bias"))
    inverse, mean, weight, bias = (v.reshape(1, -1, 1, 1) for v in parts)
    return (x - mean) * inverse * weight + bias


def _max_pooling(network, path, fields, x):
    kernel, stride, padding = (_whole(fields, f"{name}H", f"{name}W") for name in ("k", "d", "pad"))
    return F.max_pool2d(x, kernel, stride, padding, ceil_mode=bool(fields.get("ceil_mode")))


_RULES = {
    "nn.Sequential": _sequential,
    "nn.ConcatTable": lambda network, path, fields, x: [network.run(*child, x) for child in _children(network, path)],
    "nn.ParallelTable": lambda network, path, fields, x: [
        network.run(*child, item) for child, item in zip(_children(network, path), x)
    ],
    "nn.CAddTable": lambda network, path, fields, x: sum(x),
    **dict.fromkeys(("nn.Identity", "nn.Copy", "nn.Dropout"), lambda network, path, fields, x: x),
    # The first size is the batch size of training.
    "nn.View": lambda network, path, fields, x: x.reshape(len(x), *map(int, fields["size"][1:])),
    "nn.SpatialZeroPadding": lambda network, path, fields, x: F.pad(
        x, _whole(fields, "pad_l", "pad_r", "pad_t", "pad_b")
    ),
    "nn.SpatialSymmetricPadding": _symmetric_padding,
    "nn.SpatialUpSamplingNearest": lambda network, path, fields, x: F.interpolate(
        x, scale_factor=fields["scale_factor"], mode="nearest"
    ),
    "nn.SpatialReSamplingEx": _resampling,
    "nn.Linear": lambda network, path, fields, x: F.linear(
        x, network.tensor(path, "weight"), network.tensor(path, "bias")
    ),
    **dict.fromkeys(("nn.SpatialConvolution", "cudnn.SpatialConvolution"), _convolution),
    **dict.fromkeys(("nn.SpatialConstDiagonal", "inn.ConstAffine"), _affine),
    **dict.fromkeys(("nn.SpatialBatchNormalization", "cudnn.SpatialBatchNormalization"), _batch_norm),
    "nn.Threshold": lambda network, path, fields, x: F.threshold(x, fields["threshold"], fields["val"]),
    **dict.fromkeys(("nn.ReLU", "cudnn.ReLU"), lambda network, path, fields, x: F.relu(x)),
    "nn.SpatialMaxPooling": _max_pooling,
}


# ---------------------------------------------------------------------- models


class Torch7DeepMask:
    """An nn.DeepMask on patches: a trunk, and a branch each for the mask and the score, all `Torch7Network`."""

    def __init__(self, model, dtype: torch.dtype = torch.float64):
        names = {"trunk": "trunk", "mask_branch": "maskBranch", "score_branch": "scoreBranch"}
        if model.class_name == "nn.SharpMask":
            names["mask_branch"] = "maskBranchDM"
        self.trunk, self.mask_branch, self.score_branch = self.networks = [
            Torch7Network(model.fields[field], field, dtype) for field in names.values()
        ]

    def forward_mask(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised patches to (N, S * S) logits of the resized mask."""
        return self.mask_branch(self.trunk(x))

    def forward_score(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised patches to (N, 1) logits."""
        return self.score_branch(self.trunk(x))

    @property
    def coarse_mask(self) -> torch.Tensor:
        """The logits of the last mask before it was resized: (N, *)."""
        return self.mask_branch.outputs[f"{self.mask_branch.path}.modules[1]"]


class Torch7SharpMask(Torch7DeepMask):
    """An nn.SharpMask on patches: the networks of its DeepMask, and the refinement modules refs[0] to refs[4].

    As released, gradients reach the refinement alone: neither the trunk's output nor the skip features pass them on.

    Attributes:
        stages: name -> tensor of the last run: trunk_out, module0, and horizontalK, verticalK, moduleK for K = 1 to 4.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float64):
        super().__init__(model, dtype)
        refs = model.fields["refs"]
        self.refs = [Torch7Network(refs[k], f"refs[{k}]", dtype) for k in range(len(refs))]
        self.networks += self.refs
        self.skip_positions = [int(position) for position in model.fields["skpos"].sequence()]
        self.stages: dict = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised patches to (N, S * S) logits."""
        with torch.no_grad():
            trunk_out = self.trunk(x)
        encoding = self.refs[0](trunk_out)
        self.stages = {"trunk_out": trunk_out, "module0": encoding}
        for k, position in enumerate(self.skip_positions, start=1):
            encoding = self.refs[k]([self.trunk.outputs[f"trunk.modules[{position}]"], encoding])
            horizontal, vertical = self.refs[k].outputs[f"refs[{k}].modules[1]"]
            self.stages.update({f"horizontal{k}": horizontal, f"vertical{k}": vertical, f"module{k}": encoding})
        return encoding
