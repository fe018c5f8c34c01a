"""Converts a published DeepMask or SharpMask (model.t7) to a checkpoint of this package and the config that runs it.

The converter relies on the structure of the file: it lists the modules in the order in which they run and matches each with the layer that
the network has at that place. A difference is an error that names the module by its path in the file, such as model.trunk.modules[5].

Shape letters: C channels.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from ..config import add_sharpmask_config
from ..errors import UserError
from ..io.outputs import open_output, write_output
from ..modeling.meta_arch import ARCHITECTURE
from .reader import Table, TorchObject, read_torch7

_NAMESPACES = ("nn", "cudnn", "inn")
# Modules without parameters that matter in training only, or whose work our network does in another way.
_PASSED_OVER = ("Identity", "Dropout", "View", "Reshape", "Copy", "SpatialReSamplingEx", "SpatialZeroPadding")
_CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")
_ACTIVATIONS = ("ReLU", "Threshold")
_FIXED_NORMS = ("SpatialConstDiagonal", "ConstAffine")
_KNOWN = {
    *("Sequential", "ConcatTable", "ParallelTable", "CAddTable", "Linear", "SpatialBatchNormalization"),
    *("SpatialMaxPooling", "SpatialSymmetricPadding", "SpatialUpSamplingNearest"),
    *(*_PASSED_OVER, *_CONVOLUTIONS, *_ACTIVATIONS, *_FIXED_NORMS),
}
_SIDES = ("pad_l", "pad_r", "pad_t", "pad_b")
_MAX_NUMBER = 2**20

# (convolutions on a block's main path, blocks of each stage up to res4) -> depth of the ResNet.
_DEPTHS = {
    (2, (2, 2, 2)): 18,
    (2, (3, 4, 6)): 34,
    (3, (3, 4, 6)): 50,
    (3, (3, 4, 23)): 101,
    (3, (3, 8, 36)): 152,
}
_STRIDE = 16
_PREFIX = "pyramid.network."
# Detectron2's FrozenBatchNorm2d adds this to the variance.
_FROZEN_EPS = 1e-5
# Far beyond any network of this kind. They bound the work for a small file that nests a module in itself or many times.
_MAX_DEPTH, _MAX_MODULES = 50, 10_000


class ConversionError(UserError):
    """A Torch7 file holds no DeepMask or SharpMask of the published structure; the message names the file and the module."""


class Torch7Model(NamedTuple):
    """A converted model."""

    cfg: CfgNode  # builds the model
    state: dict[str, Tensor]  # the model's parameters by name


def convert_torch7(path: Union[str, Path]) -> Torch7Model:
    """Convert a published model, or one that was trained with the released code.

    Args:
        path: of a model.t7, as the released training scripts save it.

    Returns:
        Torch7Model. The state of a SharpMask also holds the coarse mask layer of its DeepMask (mask_branch.predictor), for configs whose
        REFINEMENT.NAME is "none".

    Raises:
        FileNotFoundError: the file does not exist.
        Torch7Error: the file is not a whole Torch7 file, see `read_torch7`.
        ConversionError: the model has another structure.
    """
    return convert_content(read_torch7(path), name=str(path))


def convert_content(content: Any, *, name: str) -> Torch7Model:
    """Convert the content of a file.

    Args:
        content: from `reader.read_torch7`.
        name: what error messages call the file.

    Returns:
        Torch7Model, see `convert_torch7`.

    Raises:
        ConversionError: the model has another structure.
    """
    model = content.get("model") if isinstance(content, Table) else content
    kind = model.class_name if isinstance(model, TorchObject) else None
    if kind not in ("nn.DeepMask", "nn.SharpMask"):
        found = f"a {kind}" if kind else "no object of a class"
        raise ConversionError(f"{name}: expected an nn.DeepMask or nn.SharpMask as 'model', found {found}")
    try:
        trunk = _trunk(_field(model, "trunk", "model"))
        state = {**trunk.state, **_score_head(_field(model, "scoreBranch", "model"))}
        coarse = _linear(_field(model, "maskBranch" if kind == "nn.DeepMask" else "maskBranchDM", "model"))
        state.update(coarse.named("mask_branch.predictor"))
        if kind == "nn.SharpMask":
            state.update(_refinement(model.fields))
        cfg = _config(trunk, state)
        return Torch7Model(cfg, _fit(state, cfg))
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}") from None


# ---------------------------------------------------------------------- modules in the order in which they run


class _Module(NamedTuple):
    """A module of the file."""

    kind: str  # class name without its namespace
    fields: Table
    path: str  # in the file, such as model.trunk.modules[5]
    border: int = 0  # cells that a mirrored padding before it adds on every side

    def named(self, name: str) -> dict[str, Tensor]:
        """The parameters of the module, in the shapes of the file, as `name`.weight and `name`.bias."""
        return {f"{name}.{key}": self.tensor(key) for key in ("weight", "bias")}

    def tensor(self, key: str) -> Tensor:
        """A copy of a field in float32.

        Raises:
            ConversionError: the field is missing, or has values that are not finite.
        """
        array = self.fields.get(key)
        if not isinstance(array, np.ndarray) or array.size == 0:
            raise ConversionError(f"{self.path} has no {key}")
        tensor = torch.from_numpy(array.astype(np.float32))
        if not tensor.isfinite().all():
            raise ConversionError(
                f"{self.path}.{key} has values that are not finite: the training of this model failed"
            )
        return tensor


def _field(obj: TorchObject, name: str, path: str) -> _Module:
    return _module(obj.fields.get(name), f"{path}.{name}")


def _module(obj: Any, path: str) -> _Module:
    if not isinstance(obj, TorchObject):
        raise ConversionError(f"expected a module at {path}, found {type(obj).__name__}")
    namespace, _, kind = obj.class_name.partition(".")
    if namespace in _NAMESPACES and kind in _KNOWN:
        return _Module(kind, obj.fields, path)
    raise ConversionError(f"unknown module {obj.class_name} at {path}")


def _children(module: _Module) -> list[_Module]:
    modules = module.fields.get("modules")
    if not isinstance(modules, Table):
        raise ConversionError(f"{module.path} has no modules")
    return [_module(child, f"{module.path}.modules[{i}]") for i, child in enumerate(modules.sequence(), start=1)]


def _flatten(module: _Module) -> Iterator[_Module]:
    """The modules inside a module that hold parameters or branch, in the order in which they run."""
    border = 0
    for child in _leaves(module):
        if child.kind == "SpatialSymmetricPadding":
            border = _one_number(child, _SIDES)
        elif child.kind == "SpatialZeroPadding" and _one_number(child, _SIDES) > 0:
            raise ConversionError(f"{child.path} pads with zeros: only the crop of training patches is expected there")
        elif child.kind not in _PASSED_OVER:
            if border and child.kind not in _CONVOLUTIONS:
                raise ConversionError(f"expected a convolution after the padding, at {child.path}, found {child.kind}")
            yield child._replace(border=border)
            border = 0


def _leaves(module: _Module) -> Iterator[_Module]:
    stack, count = [(module, 0)], 0
    while stack:
        child, depth = stack.pop()
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_MODULES:
            raise ConversionError(
                f"{module.path} holds more modules than any model of this kind, or a module that holds itself"
            )
        if child.kind == "Sequential":
            stack += [(grandchild, depth + 1) for grandchild in reversed(_children(child))]
        else:
            yield child


def _one_number(module: _Module, names: tuple[str, ...], *, lowest: int = -_MAX_NUMBER) -> int:
    """The whole number that all fields of these names have."""
    values = [module.fields.get(name) for name in names]
    if not all(isinstance(value, float) for value in values) or len(set(values)) != 1:
        raise ConversionError(f"{module.path} has no common number for {', '.join(names)}")
    value = values[0]
    if not lowest <= value <= _MAX_NUMBER or not value.is_integer():
        raise ConversionError(f"{module.path} has {value} for {', '.join(names)}, not a whole number from {lowest}")
    return int(value)


class _Queue:
    """Modules in the order in which they run; each is taken by the kind that is expected next."""

    def __init__(self, modules: Iterable[_Module], path: str):
        self.modules, self.path = list(modules), path

    def next_is(self, *kinds: str) -> bool:
        return bool(self.modules) and self.modules[0].kind in kinds

    def take(self, *kinds: str) -> _Module:
        if not self.modules:
            raise ConversionError(f"{self.path} ends where {' or '.join(kinds)} was expected")
        module = self.modules.pop(0)
        if module.kind not in kinds:
            raise ConversionError(f"expected {' or '.join(kinds)} at {module.path}, found {module.kind}")
        return module

    def split_before(self, kind: str) -> "_Queue":
        """Take the modules before the first one of a kind; they are returned as a queue."""
        before = []
        while self.modules and not self.next_is(kind):
            before.append(self.modules.pop(0))
        return _Queue(before, self.path)

    def end(self) -> None:
        if self.modules:
            raise ConversionError(f"unknown module {self.modules[0].kind} at {self.modules[0].path}")


# ---------------------------------------------------------------------- convolutions and norms


class _Convolution:
    """A convolution of the file.

    Attributes:
        module: of the file.
        size: side of the kernel.
        stride: in cells.
        zero_padding: cells of zeros on every side.
        weight: (output channels, input channels, size, size) float32.
        bias: (output channels,) float32, or None.
    """

    def __init__(self, module: _Module):
        self.module = module
        self.size = _one_number(module, ("kW", "kH"), lowest=1)
        self.stride = _one_number(module, ("dW", "dH"), lowest=1)
        self.zero_padding = _one_number(module, ("padW", "padH")) if "padW" in module.fields else 0
        if "groups" in module.fields and _one_number(module, ("groups",)) != 1:
            raise ConversionError(f"{module.path} is a convolution in groups: only groups = 1 is known")
        planes = [_one_number(module, (name,), lowest=1) for name in ("nOutputPlane", "nInputPlane")]
        weight = module.tensor("weight")
        if weight.numel() != math.prod(planes) * self.size**2:
            raise ConversionError(f"{module.path}.weight has {weight.numel()} values, not {planes} x {self.size}^2")
        # SpatialConvolutionMM stores a matrix.
        self.weight = weight.view(*planes, self.size, self.size)
        self.bias = module.tensor("bias").flatten() if isinstance(module.fields.get("bias"), np.ndarray) else None

    @property
    def padding(self) -> str:
        """Kind of padding: "mirrored", "zeros", or "" for a 1x1 convolution without any."""
        if self.size == 1 and not self.module.border and not self.zero_padding:
            return ""
        for padding, border in (("mirrored", self.module.border), ("zeros", self.zero_padding)):
            if border == self.size // 2 and self.module.border + self.zero_padding == border:
                return padding
        raise ConversionError(f"{self.module.path} has an unusual border: half its kernel is expected on every side")


def _affine(norm: _Module, channels: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in evaluation mode, each (C,) float32."""

    def vector(key: str) -> Tensor:
        values = norm.tensor(key).flatten()
        if len(values) != channels:
            raise ConversionError(f"{norm.path}.{key} has {len(values)} values for {channels} channels")
        return values

    if norm.kind in _FIXED_NORMS:
        return vector("a"), vector("b")
    mean = vector("running_mean")
    if "running_var" in norm.fields:
        eps = norm.fields.get("eps", 1e-5)
        if not isinstance(eps, float) or not 0 <= eps < math.inf:
            raise ConversionError(f"{norm.path}.eps is not a finite number of 0 or above")
        scale = (vector("running_var") + eps).rsqrt()
        if not scale.isfinite().all():
            raise ConversionError(f"{norm.path}.running_var has values that are not variances")
    else:
        # Before 2016, Torch stored the inverse of the standard deviation under this name.
        scale = vector("running_std")
    if "weight" in norm.fields:
        scale = scale * vector("weight")
    shift = vector("bias") if "bias" in norm.fields else torch.zeros_like(mean)
    return scale, shift - mean * scale


def _normed_convolutions(queue: _Queue) -> list[tuple[_Convolution, dict[str, Tensor]]]:
    """Take all convolutions of a queue with their norms and the activations between them.

    Returns:
        List of (convolution, state of a Detectron2 convolution with a frozen norm that computes the same).
    """
    taken = []
    while queue.modules:
        convolution = _Convolution(queue.take(*_CONVOLUTIONS))
        scale, shift = _affine(queue.take(*_FIXED_NORMS, "SpatialBatchNormalization"), len(convolution.weight))
        if convolution.bias is not None:
            if len(convolution.bias) != len(shift):
                raise ConversionError(
                    f"{convolution.module.path}.bias has {len(convolution.bias)} values for {len(shift)} channels"
                )
            shift = shift + scale * convolution.bias
        state = {
            "weight": convolution.weight,
            "norm.weight": scale,
            "norm.bias": shift,
            "norm.running_mean": torch.zeros_like(shift),
            "norm.running_var": torch.full_like(shift, 1 - _FROZEN_EPS),
        }
        taken.append((convolution, state))
        if queue.modules:
            queue.take(*_ACTIVATIONS)
    return taken


def _named(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in state.items()}


# ---------------------------------------------------------------------- the parts of the network


class _Trunk(NamedTuple):
    """The trunk with the part of the head that both branches share."""

    state: dict[str, Tensor]  # parameters by the names of our network
    depth: int  # of the ResNet
    stride_in_1x1: bool  # bottlenecks have their stride in the first convolution, not in the 3x3 one
    padding: str  # "mirrored" or "zeros"
    context: int  # pixels that a training patch shows beside its window, on both sides together


def _trunk(module: _Module) -> _Trunk:
    queue = _Queue(_flatten(module), module.path)
    stem = _normed_convolutions(queue.split_before("SpatialMaxPooling"))
    queue.take("SpatialMaxPooling")
    if len(stem) != 1:
        raise ConversionError(f"{module.path} has {len(stem)} convolutions before its pooling: a ResNet has 1")
    convolutions, state = [stem[0][0]], _named("trunk.stem.conv1", stem[0][1])
    lengths, stages = set(), []
    channels = 0
    while queue.next_is("ConcatTable"):
        main, shortcut = _block(queue)
        lengths.add(len(main))
        # A stage begins where the number of channels changes.
        if len(main[-1][0].weight) != channels:
            channels = len(main[-1][0].weight)
            stages.append(0)
        name = f"trunk.res{len(stages) + 1}.{stages[-1]}"
        stages[-1] += 1
        names = [f"{name}.conv{i}" for i in range(1, len(main) + 1)] + [f"{name}.shortcut"]
        for name, (_, part) in zip(names, main + shortcut):
            state.update(_named(name, part))
        convolutions += [convolution for convolution, _ in main]
    depth = _DEPTHS.get((max(lengths, default=0), tuple(stages))) if len(lengths) == 1 else None
    if depth is None:
        raise ConversionError(f"{module.path} has stages of {stages} blocks, which is no ResNet up to res4")
    # In a bottleneck that reduces the resolution, one of the first two convolutions has the stride.
    stride_in_1x1 = 1 in {convolution.size for convolution in convolutions if convolution.stride == 2}
    paddings = {convolution.padding for convolution in convolutions if convolution.size > 1}
    if len(paddings) > 1:
        raise ConversionError(f"{module.path} has convolutions with mirrored borders and others with zeros")
    reduce = _Convolution(queue.take(*_CONVOLUTIONS)).module
    queue.take(*_ACTIVATIONS)
    # A file that was saved after model:inference() has convolutions instead of linear layers.
    embed = queue.take("Linear", *_CONVOLUTIONS)
    queue.end()
    state.update({**reduce.named("head.reduce"), **embed.named("head.embed")})
    return _Trunk(state, depth, stride_in_1x1, paddings.pop(), _context(module))


def _block(queue: _Queue) -> tuple[list[tuple[_Convolution, dict[str, Tensor]]], ...]:
    """Take a residual block; returns the `_normed_convolutions` of its main path and of its shortcut."""
    table = queue.take("ConcatTable")
    branches = [_normed_convolutions(_Queue(_flatten(child), child.path)) for child in _children(table)]
    if len(branches) != 2 or not branches[0] or len(branches[1]) > 1:
        raise ConversionError(f"{table.path} is not the main path and the shortcut of a residual block")
    queue.take("CAddTable")
    queue.take(*_ACTIVATIONS)
    return tuple(branches)


def _context(trunk: _Module) -> int:
    """Pixels of context of a training patch, whose cells the trunk crops; the released 32 if the file has no crop."""
    for child in _leaves(trunk):
        if child.kind == "SpatialZeroPadding":
            return -2 * _STRIDE * _one_number(child, _SIDES)
    return 32


def _score_head(module: _Module) -> dict[str, Tensor]:
    queue = _Queue(_flatten(module), module.path)
    hidden = queue.take("Linear", *_CONVOLUTIONS)
    # Below its threshold it returns 1e-6 in training, but 0 in the released inference and here.
    queue.take(*_ACTIVATIONS)
    score = queue.take("Linear", *_CONVOLUTIONS)
    queue.end()
    return {**hidden.named("head.score.1"), **score.named("head.score.4")}


def _linear(module: _Module) -> _Module:
    """The only module with parameters inside `module`."""
    queue = _Queue(_flatten(module), module.path)
    linear = queue.take("Linear", *_CONVOLUTIONS)
    queue.end()
    return linear


def _refinement(model: Table) -> dict[str, Tensor]:
    nets = {name: model.get(name) for name in ("netvs", "neths", "refs")}
    for name, table in nets.items():
        if not isinstance(table, Table):
            raise ConversionError(f"model.{name} is missing")
    state = _linear(_module(nets["netvs"].get(0), "model.netvs[0]")).named("mask_branch.start")
    steps = len(nets["neths"].sequence())
    for i in range(1, steps + 1):
        for name, part in (("netvs", "vertical"), ("neths", "horizontal")):
            chain = _module(nets[name].get(i), f"model.{name}[{i}]")
            state.update(_chain(chain, f"mask_branch.steps.{i - 1}.{part}"))
    last = _module(nets["refs"].get(steps), f"model.refs[{steps}]")
    to_mask = [module for module in _flatten(last) if module.kind in _CONVOLUTIONS]
    if len(to_mask) != 1:
        raise ConversionError(f"{last.path} has {len(to_mask)} convolutions of its own: one, to the mask, is expected")
    return {**state, **_mirrored(to_mask[0]).named("mask_branch.to_mask")}


def _chain(module: _Module, name: str) -> dict[str, Tensor]:
    """Parameters of 3x3 convolutions with activations between them, numbered as in an nn.Sequential."""
    queue = _Queue(_flatten(module), module.path)
    state, position = _mirrored(queue.take(*_CONVOLUTIONS)).named(f"{name}.0"), 0
    while queue.modules:
        queue.take(*_ACTIVATIONS)
        position += 2
        state.update(_mirrored(queue.take(*_CONVOLUTIONS)).named(f"{name}.{position}"))
    return state


def _mirrored(module: _Module) -> _Module:
    convolution = _Convolution(module)
    if (convolution.size, convolution.stride, convolution.padding) != (3, 1, "mirrored"):
        raise ConversionError(f"expected a 3x3 convolution with mirrored borders at {module.path}")
    return module


# ---------------------------------------------------------------------- the config, and the model it builds


def _default_config() -> CfgNode:
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    return cfg


def _config(trunk: _Trunk, state: dict[str, Tensor]) -> CfgNode:
    cfg = _default_config()
    cfg.MODEL.META_ARCHITECTURE = ARCHITECTURE
    cfg.INPUT.FORMAT = "RGB"
    # Images keep their size, to which the pyramid's scales refer.
    cfg.INPUT.MIN_SIZE_TEST = 0
    sharpmask = cfg.MODEL.SHARPMASK
    sharpmask.RESIZING = "released"
    sharpmask.CONTEXT = trunk.context
    sharpmask.TRUNK.RESNET_DEPTH = trunk.depth
    sharpmask.TRUNK.STRIDE_IN_1X1 = trunk.stride_in_1x1
    sharpmask.TRUNK.PADDING = trunk.padding
    sharpmask.REDUCED_CHANNELS = len(state["head.reduce.bias"])
    sharpmask.EMBED_DIM = len(state["head.embed.bias"])
    sharpmask.SCORE_DIM = len(state["head.score.1.bias"])
    sharpmask.COARSE_MASK_SIZE = math.isqrt(len(state["mask_branch.predictor.bias"]))
    # If the sizes do not divide, `_fit` names the parameter.
    cells = state["head.embed.weight"].numel() // (sharpmask.EMBED_DIM * sharpmask.REDUCED_CHANNELS)
    sharpmask.WINDOW_SIZE = math.isqrt(cells) * _STRIDE
    sharpmask.REFINEMENT.NAME = "sharpmask" if "mask_branch.start.bias" in state else "none"
    if sharpmask.REFINEMENT.NAME == "sharpmask":
        sharpmask.REFINEMENT.CHANNELS = len(state["mask_branch.start.bias"]) // max(cells, 1)
    return cfg


def _fit(state: dict[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """The parameters with the names and shapes that they have in the model of `cfg`."""
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if missing := sorted(name for name in shapes if name.removeprefix(_PREFIX) not in state):
        raise ConversionError(f"a model of this structure also has {missing[0]}, for which the file has nothing")
    fitted = {}
    for name, value in state.items():
        shape = shapes.get(_PREFIX + name)
        # The coarse mask layer of a SharpMask is kept, although its model does not use it.
        if shape is None and not name.startswith("mask_branch.predictor."):
            raise ConversionError(f"the file also has {name}, which a model of this structure does not have")
        if shape is not None and shape.numel() != value.numel():
            raise ConversionError(f"{name} has {value.numel()} values, {tuple(shape)} were expected")
        fitted[_PREFIX + name] = value if shape is None else value.reshape(shape)
    return fitted


def save_torch7_model(model: Torch7Model, output: Union[str, Path]) -> Path:
    """Write a checkpoint for MODEL.WEIGHTS and, in the same folder, the config that runs it.

    Args:
        model: from `convert_torch7`.
        output: path of the checkpoint; Detectron2 recognises the format by its suffix, .pth.

    Returns:
        Path of the config: that of the checkpoint with suffix .yaml.

    Raises:
        UserError: the checkpoint has another suffix.
        OutputError: a file cannot be written.
    """
    output, config = Path(output), config_path(output)
    with open_output(output) as file:
        torch.save({"model": model.state}, file)
    cfg = model.cfg.clone()
    cfg.MODEL.WEIGHTS = str(output.resolve())
    text = yaml.safe_dump({**_changes(cfg, _default_config()), "VERSION": cfg.VERSION}, sort_keys=False)
    write_output(config, text.encode())
    return config


def config_path(output: Union[str, Path]) -> Path:
    """The path to which `save_torch7_model` writes the config.

    Args:
        output: path of the checkpoint.

    Raises:
        UserError: the name of the checkpoint does not end in .pth.
    """
    if Path(output).suffix != ".pth":
        raise UserError(f"--output {output}: the name of a checkpoint has to end in .pth")
    return Path(output).with_suffix(".yaml")


def _changes(cfg: CfgNode, default: CfgNode) -> dict[str, Any]:
    """The keys of `cfg` whose values differ from the default, as nested dicts."""
    changes = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            value = _changes(value, default[key])
        if value != default[key] and value != {}:
            changes[key] = value
    return changes
