"""Torch7's nn modules, interpreted one by one on what the reader gives: forward, and backward written by hand, without autograd.

Slow and literal on purpose: an independent reference for the networks of this package. Everything is as in Torch7's evaluation mode.

Shape letters: N batch, H and W rows and columns, S side of the mask.
"""

import numpy as np
import torch
import torch.nn.functional as F

_LAYERS: dict = {}


def _layer(*class_names: str):
    """The class below interprets these Torch classes."""

    def register(cls):
        _LAYERS.update(dict.fromkeys(class_names, cls))
        return cls

    return register


class Literal:
    """A module with all that it contains.

    Attributes:
        layers: path -> layer, whose `output` is that of the last forward; paths are such as "modules[1].modules[2]", that of `module`
            itself is `path`.
        gradients: path -> {"weight": tensor, "bias": tensor} of every layer with parameters that a backward reached; they add up until
            `zero_gradients`.
    """

    def __init__(self, module, *, dtype: torch.dtype = torch.float64, path: str = "", in_place: bool = False):
        """
        Args:
            module: TorchObject of an nn module.
            dtype: of all computation.
            path: where the module is in its model, put in front of all paths.
            in_place: backward of modules that say `inplace` overwrites the gradient it is given, as in Torch7. It matters where a gradient
                is shared: an in-place CAddTable hands the same memory to both branches of a residual block, so that an in-place
                normalisation that ends the first one scales the gradient of the other, too.

        Raises:
            NotImplementedError: a class that is not known here.
        """
        self.dtype, self.in_place = dtype, in_place
        self.layers: dict = {}
        self.gradients: dict = {}
        self.root = self._build(module, path)

    def _build(self, module, path: str):
        if module.class_name not in _LAYERS:
            raise NotImplementedError(f"{module.class_name} at {path or 'the root'}")
        layer = _LAYERS[module.class_name](module, path, self)
        self.layers[path] = layer
        return layer

    @torch.no_grad()
    def forward(self, x):
        """Args: x, a tensor or array, or a list of them for modules that take tables. Returns: likewise, of `dtype`."""
        return self.root.forward(_as_tensors(x, self.dtype))

    @torch.no_grad()
    def backward(self, grad_output):
        """The gradient of the input of the last forward; parameters' go to `gradients`."""
        return self.root.backward(_as_tensors(grad_output, self.dtype))

    @property
    def output(self):
        """What the last forward gave."""
        return self.root.output

    def zero_gradients(self) -> None:
        self.gradients.clear()

    def gradient_of(self, module) -> dict:
        """The entry of `gradients` of a module object, which is looked up by identity.

        Raises:
            KeyError: it is not in the network, or no backward reached it.
        """
        for path, layer in self.layers.items():
            if layer.module is module:
                return self.gradients[path]
        raise KeyError(f"{module!r} is not in this network")


def _as_tensors(value, dtype: torch.dtype):
    """Copies, so that nothing is shared with the caller."""
    if isinstance(value, (list, tuple)):
        return [_as_tensors(item, dtype) for item in value]
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone().to(dtype)
    # Arrays of the reader are views that cannot be written, with any strides.
    return torch.from_numpy(np.array(value, order="C")).to(dtype)


class _Layer:
    """One module: `update_output` and `update_grad_input` are named after their Torch7 counterparts."""

    def __init__(self, module, path: str, network: Literal):
        self.module, self.path, self.network, self.fields = module, path, network, module.fields
        self.input = self.output = None
        self.setup()

    def setup(self) -> None:
        pass

    def children(self) -> list:
        prefix = f"{self.path}." if self.path else ""
        modules = self.fields["modules"].sequence()
        return [self.network._build(child, f"{prefix}modules[{i}]") for i, child in enumerate(modules, start=1)]

    def forward(self, x):
        self.input = x
        self.output = self.update_output(x)
        return self.output

    def backward(self, grad):
        grad_input = self.update_grad_input(self.input, grad)
        self.accumulate(self.input, grad)
        return grad_input

    def accumulate(self, x, grad) -> None:
        pass

    def update_output(self, x):
        raise NotImplementedError

    def update_grad_input(self, x, grad):
        raise NotImplementedError

    # ------------------------------------------------------------------ what layers share

    def tensor(self, name: str):
        """A field as a tensor; None where it is missing or empty."""
        value = self.fields.get(name)
        return None if value is None or value.size == 0 else _as_tensors(value, self.network.dtype)

    def whole(self, name: str, default=None) -> int:
        value = self.fields.get(name, default)
        number = int(value)
        assert number == value, f"{name} of {self.module.class_name} at {self.path} is {value}"
        return number

    def collect(self, **gradients) -> None:
        """Add to the gradients of parameters that the module has."""
        entry = self.network.gradients.setdefault(self.path, {})
        for name, gradient in gradients.items():
            if self.fields.get(name) is not None:
                gradient = gradient.reshape(self.fields[name].shape)
                entry[name] = entry[name] + gradient if name in entry else gradient

    @property
    def in_place(self) -> bool:
        """In Lua everything but nil and false is true: the number 2 of CAddTable(2) is."""
        flag = self.fields.get("inplace")
        return self.network.in_place and flag is not None and flag is not False

    def times(self, grad, factor):
        return grad.mul_(factor) if self.in_place else grad * factor


# ---------------------------------------------------------------------- containers


@_layer("nn.Sequential")
class _Sequential(_Layer):
    def setup(self):
        self.chain = self.children()

    def update_output(self, x):
        for child in self.chain:
            x = child.forward(x)
        return x

    def update_grad_input(self, x, grad):
        for child in reversed(self.chain):
            grad = child.backward(grad)
        return grad


@_layer("nn.ConcatTable")
class _ConcatTable(_Layer):
    def setup(self):
        self.branches = self.children()

    def update_output(self, x):
        return [branch.forward(x) for branch in self.branches]

    def update_grad_input(self, x, grad):
        # The first is copied before the second branch runs, which matters where gradients share memory.
        total = self.branches[0].backward(grad[0]).clone()
        for branch, branch_grad in zip(self.branches[1:], grad[1:]):
            total += branch.backward(branch_grad)
        return total


@_layer("nn.ParallelTable")
class _ParallelTable(_Layer):
    def setup(self):
        self.branches = self.children()

    def update_output(self, x):
        return [branch.forward(item) for branch, item in zip(self.branches, x)]

    def update_grad_input(self, x, grad):
        return [branch.backward(branch_grad) for branch, branch_grad in zip(self.branches, grad)]


@_layer("nn.CAddTable")
class _CAddTable(_Layer):
    def update_output(self, x):
        total = x[0].clone()
        for item in x[1:]:
            total += item
        return total

    def update_grad_input(self, x, grad):
        return [grad if self.in_place else grad.clone() for _ in x]


# ---------------------------------------------------------------------- shapes


@_layer("nn.Identity", "nn.Copy", "nn.Dropout")
class _Identity(_Layer):
    def setup(self):
        # Dropout of before v2 scaled here and not in training.
        if self.fields.get("v2") is False:
            raise NotImplementedError(f"{self.module.class_name} of version 1 at {self.path}")

    def update_output(self, x):
        return x

    def update_grad_input(self, x, grad):
        return grad


@_layer("nn.View", "nn.Reshape")
class _View(_Layer):
    def setup(self):
        self.sizes = [int(size) for size in self.fields["size"]]

    def update_output(self, x):
        # The files' first size is the batch of training; a Reshape may be of one sample instead.
        one_sample = self.module.class_name == "nn.Reshape" and int(np.prod(self.sizes)) == x[0].numel()
        return x.reshape(len(x), *(self.sizes if one_sample else self.sizes[1:]))

    def update_grad_input(self, x, grad):
        return grad.reshape(x.shape)


@_layer("nn.SpatialZeroPadding")
class _ZeroPadding(_Layer):
    def setup(self):
        # In the order of F.pad.
        self.pads = [self.whole(name) for name in ("pad_l", "pad_r", "pad_t", "pad_b")]

    def update_output(self, x):
        return F.pad(x, self.pads)

    def update_grad_input(self, x, grad):
        return F.pad(grad, [-pad for pad in self.pads])


@_layer("nn.SpatialSymmetricPadding")
class _SymmetricPadding(_ZeroPadding):
    """Its backward is inherited, so that the padded pixels are constants."""

    def update_output(self, x):
        x = F.pad(x, [min(pad, 0) for pad in self.pads])
        left, right, top, bottom = (max(pad, 0) for pad in self.pads)
        if max(top, bottom) > x.shape[2] or max(left, right) > x.shape[3]:
            raise ValueError(f"a map of {tuple(x.shape[2:])} cannot be mirrored by {self.pads}")
        x = x.index_select(2, _mirrored(x.shape[2], top, bottom))
        return x.index_select(3, _mirrored(x.shape[3], left, right))


def _mirrored(size: int, before: int, after: int) -> torch.Tensor:
    """Where the entries of a line padded like "cba|abc" come from."""
    return torch.tensor([*range(before - 1, -1, -1), *range(size), *range(size - 1, size - 1 - after, -1)])


@_layer("nn.SpatialUpSamplingNearest")
class _UpSamplingNearest(_Layer):
    def setup(self):
        self.factor = self.whole("scale_factor")

    def update_output(self, x):
        return x.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def update_grad_input(self, x, grad):
        n, c, h, w = x.shape
        return grad.reshape(n, c, h, self.factor, w, self.factor).sum((3, 5))


@_layer("nn.SpatialReSamplingEx")
class _ReSamplingEx(_Layer):
    def setup(self):
        if self.fields["mode"] != "bilinear":
            raise NotImplementedError(f"{self.module.class_name} in mode {self.fields['mode']!r} at {self.path}")
        # Lua counts dimensions from 1.
        self.dims = self.whole("yDim", 2) - 1, self.whole("xDim", 3) - 1

    def output_size(self, dim: int) -> int:
        side = ("height", "width")[self.dims.index(dim)]
        size = self.fields.get(f"o{side}")
        return int(size) if size is not None else int(self.fields[f"r{side}"] * self.input.shape[dim] + 0.5)

    def taps(self, dim: int) -> list:
        """The two source indices of every output index with their weights, shaped to multiply along `dim`."""
        size, out_size = self.input.shape[dim], self.output_size(dim)
        # i * (size - 1) / (out_size - 1), whole and rest apart, so that corners meet exactly.
        position = torch.arange(out_size) * (size - 1)
        step = max(out_size - 1, 1)
        low = position // step
        high = (low + 1).clamp(max=size - 1)
        shape = [-1] + [1] * (self.input.ndim - 1 - dim)
        rest = ((position % step).to(self.input.dtype) / step).reshape(shape)
        return [(low, 1 - rest), (high, rest)]

    def update_output(self, x):
        rows, columns = (self.taps(dim) for dim in self.dims)
        total = 0
        for y, weight_y in rows:
            for column, weight_x in columns:
                total = total + weight_y * weight_x * x.index_select(self.dims[0], y).index_select(self.dims[1], column)
        return total

    def update_grad_input(self, x, grad):
        rows, columns = (self.taps(dim) for dim in self.dims)
        total = torch.zeros_like(x)
        wide = list(x.shape)
        wide[self.dims[1]] = grad.shape[self.dims[1]]
        for y, weight_y in rows:
            for column, weight_x in columns:
                spread = grad.new_zeros(wide).index_add_(self.dims[0], y, weight_y * weight_x * grad)
                total.index_add_(self.dims[1], column, spread)
        return total


# ---------------------------------------------------------------------- arithmetic


@_layer("nn.Linear")
class _Linear(_Layer):
    def setup(self):
        self.weight, self.bias = self.tensor("weight"), self.tensor("bias")

    def update_output(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def update_grad_input(self, x, grad):
        return grad @ self.weight

    def accumulate(self, x, grad):
        self.collect(weight=grad.T @ x, bias=grad.sum(0))


@_layer("nn.SpatialConvolution", "nn.SpatialConvolutionMM", "cudnn.SpatialConvolution")
class _Convolution(_Layer):
    def setup(self):
        self.groups = self.whole("groups", 1)
        kernel = self.whole("nOutputPlane"), -1, self.whole("kH"), self.whole("kW")
        # SpatialConvolutionMM keeps a matrix.
        self.weight, self.bias = self.tensor("weight").reshape(kernel), self.tensor("bias")
        self.stride = self.whole("dH"), self.whole("dW")
        self.padding = self.whole("padH", 0), self.whole("padW", 0)

    def update_output(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.groups)

    def update_grad_input(self, x, grad):
        return torch.nn.grad.conv2d_input(x.shape, self.weight, grad, self.stride, self.padding, groups=self.groups)

    def accumulate(self, x, grad):
        shape = self.weight.shape
        weight = torch.nn.grad.conv2d_weight(x, shape, grad, self.stride, self.padding, groups=self.groups)
        self.collect(weight=weight, bias=grad.sum((0, 2, 3)))


@_layer("nn.SpatialConstDiagonal", "inn.ConstAffine")
class _ConstAffine(_Layer):
    """a and b are constants: nobody wants their gradients."""

    def setup(self):
        self.a, self.b = (self.tensor(name).reshape(1, -1, 1, 1) for name in "ab")

    def update_output(self, x):
        return self.a * x + self.b

    def update_grad_input(self, x, grad):
        return self.times(grad, self.a)


@_layer("nn.SpatialBatchNormalization", "cudnn.SpatialBatchNormalization")
class _BatchNormalization(_Layer):
    def setup(self):
        # Older files keep the inverse of the deviation under the name of the deviation.
        if self.tensor("running_var") is not None:
            inverse = 1 / (self.tensor("running_var") + self.fields["eps"]).sqrt()
        else:
            inverse = self.tensor("running_std")
        mean, weight, bias = (self.tensor(name) for name in ("running_mean", "weight", "bias"))
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
        self.mean, self.inverse, self.weight, self.bias = (
            v.reshape(1, -1, 1, 1) for v in (mean, inverse, weight, bias)
        )

    def update_output(self, x):
        return (x - self.mean) * self.inverse * self.weight + self.bias

    def update_grad_input(self, x, grad):
        return grad * self.inverse * self.weight

    def accumulate(self, x, grad):
        normalised = (x - self.mean) * self.inverse
        self.collect(weight=(grad * normalised).sum((0, 2, 3)), bias=grad.sum((0, 2, 3)))


@_layer("nn.Threshold")
class _Threshold(_Layer):
    def setup(self):
        self.threshold, self.value = float(self.fields["threshold"]), float(self.fields["val"])

    def update_output(self, x):
        return torch.where(x > self.threshold, x, torch.full_like(x, self.value))

    def update_grad_input(self, x, grad):
        return self.times(grad, (x > self.threshold).to(grad.dtype))


@_layer("nn.ReLU", "cudnn.ReLU")
class _ReLU(_Threshold):
    def setup(self):
        self.threshold = self.value = 0.0


@_layer("nn.SpatialMaxPooling", "cudnn.SpatialMaxPooling")
class _MaxPooling(_Layer):
    def update_output(self, x):
        kernel, stride = ((self.whole(f"{name}H"), self.whole(f"{name}W")) for name in "kd")
        padding = self.whole("padH", 0), self.whole("padW", 0)
        ceil_mode = bool(self.fields.get("ceil_mode"))
        y, self.indices = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
        return y

    def update_grad_input(self, x, grad):
        total = torch.zeros_like(x).flatten(2)
        return total.scatter_add_(2, self.indices.flatten(2), grad.flatten(2)).reshape(x.shape)


# ---------------------------------------------------------------------- models


class _Composite:
    """Several networks; `networks` lists them, and paths begin with their names in the model."""

    def __init__(self, model, **options):
        self.model, self.options = model, options
        self.networks: list = []

    def part(self, module, path: str) -> Literal:
        network = Literal(module, path=path, **self.options)
        self.networks.append(network)
        return network

    @property
    def layers(self) -> dict:
        return {path: layer for network in self.networks for path, layer in network.layers.items()}

    @property
    def gradients(self) -> dict:
        """path -> gradients, as of `Literal`, of all parts; paths begin with the field, such as "trunk.modules[9]"."""
        return {path: gradient for network in self.networks for path, gradient in network.gradients.items()}

    def gradient_of(self, module) -> dict:
        """As of `Literal`."""
        for path, layer in self.layers.items():
            if layer.module is module:
                return self.gradients[path]
        raise KeyError(f"{module!r} is not in this network")

    def zero_gradients(self) -> None:
        for network in self.networks:
            network.zero_gradients()


class LiteralDeepMask(_Composite):
    """nn.DeepMask on patches: the trunk, and a branch for the mask and one for the score.

    Attributes:
        trunk, mask_branch, score_branch: `Literal`.
    """

    def __init__(self, model, **options):
        """
        Args:
            model: TorchObject of nn.DeepMask.
            options: dtype and in_place, as of `Literal`.
        """
        super().__init__(model, **options)
        self.trunk = self.part(model.fields["trunk"], "trunk")
        self.mask_branch = self.part(model.fields["maskBranch"], "maskBranch")
        self.score_branch = self.part(model.fields["scoreBranch"], "scoreBranch")

    def forward_mask(self, x):
        """(N, 3, H, W) normalised patches -> (N, S * S) logits of the resized mask; `coarse_mask` has those before."""
        return self.mask_branch.forward(self.trunk.forward(x))

    def forward_score(self, x):
        """(N, 3, H, W) normalised patches -> (N, 1) logits."""
        return self.score_branch.forward(self.trunk.forward(x))

    @property
    def coarse_mask(self):
        """(N, *), what the linear layer of the mask branch gave last."""
        return self.mask_branch.layers["maskBranch.modules[1]"].output

    def backward_mask(self, grad_output):
        """The gradient of the patches after `forward_mask`."""
        return self.trunk.backward(self.mask_branch.backward(grad_output))

    def backward_score(self, grad_output):
        """The gradient of the patches after `forward_score`."""
        return self.trunk.backward(self.score_branch.backward(grad_output))


class LiteralSharpMask(_Composite):
    """nn.SharpMask on patches.

    Attributes:
        trunk, mask_branch, score_branch: `Literal`, the last two those of DeepMask.
        refs: list of `Literal`, 0 to 4.
        stages: of the last forward, name -> tensor: trunk_out, module0, and horizontalK, verticalK, moduleK for K = 1 to 4.
    """

    def __init__(self, model, **options):
        """
        Args:
            model: TorchObject of nn.SharpMask.
            options: dtype and in_place, as of `Literal`.
        """
        super().__init__(model, **options)
        self.trunk = self.part(model.fields["trunk"], "trunk")
        self.mask_branch = self.part(model.fields["maskBranchDM"], "maskBranchDM")
        self.score_branch = self.part(model.fields["scoreBranch"], "scoreBranch")
        refs = model.fields["refs"]
        self.refs = [self.part(refs[k], f"refs[{k}]") for k in range(len(refs))]
        self.skip_positions = [int(position) for position in model.fields["skpos"].sequence()]
        self.stages: dict = {}

    def forward(self, x):
        """(N, 3, H, W) normalised patches -> (N, S * S) logits."""
        encoding = self.refs[0].forward(self.trunk.forward(x))
        self.stages = {"trunk_out": self.trunk.output, "module0": encoding}
        for k, position in enumerate(self.skip_positions, start=1):
            skip = self.trunk.layers[f"trunk.modules[{position}]"].output
            encoding = self.refs[k].forward([skip, encoding])
            horizontal, vertical = self.refs[k].layers[f"refs[{k}].modules[1]"].output
            self.stages.update({f"horizontal{k}": horizontal, f"vertical{k}": vertical, f"module{k}": encoding})
        return encoding

    def forward_score(self, x):
        """(N, 3, H, W) normalised patches -> (N, 1) logits."""
        return self.score_branch.forward(self.trunk.forward(x))

    def backward(self, grad_output):
        """The gradient of the trunk's output by way of the mask encoding; as released, the trunk itself gets none, nor do the skips."""
        for ref in reversed(self.refs[1:]):
            grad_output = ref.backward(grad_output)[1]
        return self.refs[0].backward(grad_output)


# ---------------------------------------------------------------------- losses


class SoftMarginCriterion:
    """nn.SoftMarginCriterion: the mean over all elements of log(1 + exp(-y x)), y being -1 or 1."""

    @staticmethod
    def forward(x, y) -> float:
        x, y = _as_tensors([x, y], torch.float64)
        return (torch.log(1 + torch.exp(-y * x)).sum() / x.numel()).item()

    @staticmethod
    def backward(x, y):
        x, y = _as_tensors([x, y], torch.float64)
        z = torch.exp(-y * x)
        return -y * z / (1 + z) / x.numel()


def scaled_mask_gradient(grad_output, inputs):
    """What the released trainer makes of the loss's gradient in batches of masks (not of scores): times the batch size."""
    return grad_output * len(inputs)
