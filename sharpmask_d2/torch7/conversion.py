"""From a published DeepMask or SharpMask (model.t7) to a checkpoint of this package and the config that runs it.

A file is understood by its structure: the modules are listed in the order in which they run, and matched with what the network has at that
place. What differs is an error that names the module by its path in the file, such as model.trunk.modules[5].
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Union

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
# Modules without parameters that only matter in training, or that our network does by other means.
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

# Convolutions of a block's main path and blocks per stage, up to res4.
_DEPTHS = {
    (2, (2, 2, 2)): 18,
    (2, (3, 4, 6)): 34,
    (3, (3, 4, 6)): 50,
    (3, (3, 4, 23)): 101,
    (3, (3, 8, 36)): 152,
}
_STRIDE = 16
_PREFIX = "pyramid.network."
# Detectron2's FrozenBatchNorm2d has this in its square root.
_FROZEN_EPS = 1e-5
# Far beyond any network of this kind; a small file may nest a module in itself, or twice in every one of many levels.
_MAX_DEPTH, _MAX_MODULES = 50, 10_000


class ConversionError(UserError):
    """A Torch7 file that does not hold a DeepMask or SharpMask of the published structure; the message names the place."""


class Torch7Model(NamedTuple):
    """What a file was converted to: a config that builds the model, and the parameters by the names they have there."""

    cfg: CfgNode
    state: dict


def convert_torch7(path: Union[str, Path]) -> Torch7Model:
    """Convert a published model, or one that the released code trained.

    Args:
        path: model.t7, as the released training scripts save it.

    Returns:
        Torch7Model; a SharpMask's state also has the coarse mask of the DeepMask inside it (mask_branch.predictor), for a config whose
        REFINEMENT.NAME is "none".

    Raises:
        FileNotFoundError, Torch7Error: see `read_torch7`.
        ConversionError: another structure.
    """
    return convert_content(read_torch7(path), name=str(path))


def convert_content(content, *, name: str) -> Torch7Model:
    """`convert_torch7` of what was read from a file, which errors call `name`."""
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
    """A module and its path. `border`: cells that the mirrored padding before it adds on every side."""

    kind: str
    fields: Table
    path: str
    border: int = 0

    def named(self, name: str) -> dict:
        """Its weight, as it lies in the file, and its bias: name -> tensor."""
        return {f"{name}.{key}": self.tensor(key) for key in ("weight", "bias")}

    def tensor(self, key: str) -> Tensor:
        """A field as a float32 copy.

        Raises:
            ConversionError: it is missing, or has values that are not finite.
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


def _module(obj, path: str) -> _Module:
    if not isinstance(obj, TorchObject):
        raise ConversionError(f"expected a module at {path}, found {type(obj).__name__}")
    namespace, _, kind = obj.class_name.partition(".")
    if namespace in _NAMESPACES and kind in _KNOWN:
        return _Module(kind, obj.fields, path)
    raise ConversionError(f"unknown module {obj.class_name} at {path}")


def _children(module: _Module) -> list:
    modules = module.fields.get("modules")
    if not isinstance(modules, Table):
        raise ConversionError(f"{module.path} has no modules")
    return [_module(child, f"{module.path}.modules[{i}]") for i, child in enumerate(modules.sequence(), start=1)]


def _flatten(module: _Module) -> Iterator[_Module]:
    """The modules below one that hold parameters or branch, in the order in which they run."""
    border = 0
    for child in _leaves(module):
        if child.kind == "SpatialSymmetricPadding":
            border = _one_number(child, _SIDES)
        elif child.kind == "SpatialZeroPadding" and _one_number(child, _SIDES) > 0:
            raise ConversionError(f"{child.path} pads with zeros: only the cropping of training patches is known there")
        elif child.kind not in _PASSED_OVER:
            if border and child.kind not in _CONVOLUTIONS:
                raise ConversionError(f"expected a convolution behind the padding, at {child.path}, found {child.kind}")
            yield child._replace(border=border)
            border = 0


def _leaves(module: _Module) -> Iterator[_Module]:
    stack, count = [(module, 0)], 0
    while stack:
        child, depth = stack.pop()
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_MODULES:
            raise ConversionError(
                f"{module.path} holds more modules than any model of this kind, or one that holds itself"
            )
        if child.kind == "Sequential":
            stack += [(grandchild, depth + 1) for grandchild in reversed(_children(child))]
        else:
            yield child


def _one_number(module: _Module, names: tuple, *, lowest: int = -_MAX_NUMBER) -> int:
    """The whole number that fields share."""
    values = [module.fields.get(name) for name in names]
    if not all(isinstance(value, float) for value in values) or len(set(values)) != 1:
        raise ConversionError(f"{module.path} has not one value for {', '.join(names)}")
    value = values[0]
    if not lowest <= value <= _MAX_NUMBER or not value.is_integer():
        raise ConversionError(f"{module.path} has {value} for {', '.join(names)}, not a whole number from {lowest}")
    return int(value)


class _Queue:
    """Modules taken one after the other, each by the kind that has to come."""

    def __init__(self, modules: Iterable, path: str):
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
        """Takes the modules before the first of a kind; returns them as a queue."""
        before = []
        while self.modules and not self.next_is(kind):
            before.append(self.modules.pop(0))
        return _Queue(before, self.path)

    def end(self) -> None:
        if self.modules:
            raise ConversionError(f"unknown module {self.modules[0].kind} at {self.modules[0].path}")


# ---------------------------------------------------------------------- convolutions and norms


class _Convolution:
    """A convolution of the file: its weight as (out, in, height, width), its bias or None, its borders and stride."""

    def __init__(self, module: _Module):
        self.module = module
        self.size = _one_number(module, ("kW", "kH"), lowest=1)
        self.stride = _one_number(module, ("dW", "dH"), lowest=1)
        self.zero_padding = _one_number(module, ("padW", "padH")) if "padW" in module.fields else 0
        if "groups" in module.fields and _one_number(module, ("groups",)) != 1:
            raise ConversionError(f"{module.path} is a convolution in groups")
        planes = [_one_number(module, (name,), lowest=1) for name in ("nOutputPlane", "nInputPlane")]
        weight = module.tensor("weight")
        if weight.numel() != math.prod(planes) * self.size**2:
            raise ConversionError(f"{module.path}.weight has {weight.numel()} values, not {planes} x {self.size}^2")
        # SpatialConvolutionMM keeps it as a matrix.
        self.weight = weight.view(*planes, self.size, self.size)
        self.bias = module.tensor("bias").flatten() if isinstance(module.fields.get("bias"), np.ndarray) else None

    @property
    def padding(self) -> str:
        """ "mirrored" or "zeros", and "" for a convolution of 1x1, which has no border."""
        if self.size == 1 and not self.module.border and not self.zero_padding:
            return ""
        for padding, border in (("mirrored", self.module.border), ("zeros", self.zero_padding)):
            if border == self.size // 2 and self.module.border + self.zero_padding == border:
                return padding
        raise ConversionError(f"{self.module.path} has an unusual border")


def _affine(norm: _Module, channels: int) -> tuple:
    """Scale and shift of a norm in evaluation, (C,) each."""

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
            raise ConversionError(f"{norm.path}.eps is no number from 0")
        scale = (vector("running_var") + eps).rsqrt()
        if not scale.isfinite().all():
            raise ConversionError(f"{norm.path}.running_var has values that are no variances")
    else:
        # Before 2016 Torch kept the inverse of the standard deviation under this name.
        scale = vector("running_std")
    if "weight" in norm.fields:
        scale = scale * vector("weight")
    shift = vector("bias") if "bias" in norm.fields else torch.zeros_like(mean)
    return scale, shift - mean * scale


def _normed_convolutions(queue: _Queue) -> list:
    """Takes convolutions with their norms, and the activations between them, to the end.

    Returns:
        list of (convolution, state of a Detectron2 convolution with a frozen norm that does the same).
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


def _named(name: str, state: dict) -> dict:
    return {f"{name}.{key}": value for key, value in state.items()}


# ---------------------------------------------------------------------- the parts of the network


class _Trunk(NamedTuple):
    """The trunk with the head's shared part: its state, and what the config has to say about it (see config.py)."""

    state: dict
    depth: int
    stride_in_1x1: bool
    padding: str
    context: int


def _trunk(module: _Module) -> _Trunk:
    queue = _Queue(_flatten(module), module.path)
    stem = _normed_convolutions(queue.split_before("SpatialMaxPooling"))
    queue.take("SpatialMaxPooling")
    if len(stem) != 1:
        raise ConversionError(f"{module.path} begins with {len(stem)} convolutions before its pooling, a ResNet with 1")
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
    # In a bottleneck that shrinks, one of the first two convolutions has the stride.
    stride_in_1x1 = 1 in {convolution.size for convolution in convolutions if convolution.stride == 2}
    paddings = {convolution.padding for convolution in convolutions if convolution.size > 1}
    if len(paddings) > 1:
        raise ConversionError(f"{module.path} has convolutions with mirrored borders and others with zeros")
    reduce = _Convolution(queue.take(*_CONVOLUTIONS)).module
    queue.take(*_ACTIVATIONS)
    # A file saved after model:inference() has convolutions in the place of linear layers.
    embed = queue.take("Linear", *_CONVOLUTIONS)
    queue.end()
    state.update({**reduce.named("head.reduce"), **embed.named("head.embed")})
    return _Trunk(state, depth, stride_in_1x1, paddings.pop(), _context(module))


def _block(queue: _Queue) -> tuple:
    """Takes a residual block; returns what `_normed_convolutions` says of its main path and of its shortcut."""
    table = queue.take("ConcatTable")
    branches = [_normed_convolutions(_Queue(_flatten(child), child.path)) for child in _children(table)]
    if len(branches) != 2 or not branches[0] or len(branches[1]) > 1:
        raise ConversionError(f"{table.path} is not the main path and the shortcut of a residual block")
    queue.take("CAddTable")
    queue.take(*_ACTIVATIONS)
    return tuple(branches)


def _context(trunk: _Module) -> int:
    """Pixels of context around a training patch, whose cells the trunk crops; as released where the file no longer says."""
    for child in _leaves(trunk):
        if child.kind == "SpatialZeroPadding":
            return -2 * _STRIDE * _one_number(child, _SIDES)
    return 32


def _score_head(module: _Module) -> dict:
    queue = _Queue(_flatten(module), module.path)
    hidden = queue.take("Linear", *_CONVOLUTIONS)
    # Its value below the threshold, 1e-6 in training, is 0 in the released inference and here.
    queue.take(*_ACTIVATIONS)
    score = queue.take("Linear", *_CONVOLUTIONS)
    queue.end()
    return {**hidden.named("head.score.1"), **score.named("head.score.4")}


def _linear(module: _Module) -> _Module:
    """The only module with parameters below `module`."""
    queue = _Queue(_flatten(module), module.path)
    linear = queue.take("Linear", *_CONVOLUTIONS)
    queue.end()
    return linear


def _refinement(model: Table) -> dict:
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
        raise ConversionError(f"{last.path} has {len(to_mask)} convolutions of its own, not the one to the mask")
    return {**state, **_mirrored(to_mask[0]).named("mask_branch.to_mask")}


def _chain(module: _Module, name: str) -> dict:
    """3x3 convolutions with activations between them, numbered as in an nn.Sequential."""
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


def _config(trunk: _Trunk, state: dict) -> CfgNode:
    cfg = _default_config()
    cfg.MODEL.META_ARCHITECTURE = ARCHITECTURE
    cfg.INPUT.FORMAT = "RGB"
    # Images keep their size: the pyramid's scales refer to it.
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
    # What does not divide here is found when the state has to fit.
    cells = state["head.embed.weight"].numel() // (sharpmask.EMBED_DIM * sharpmask.REDUCED_CHANNELS)
    sharpmask.WINDOW_SIZE = math.isqrt(cells) * _STRIDE
    sharpmask.REFINEMENT.NAME = "sharpmask" if "mask_branch.start.bias" in state else "none"
    if sharpmask.REFINEMENT.NAME == "sharpmask":
        sharpmask.REFINEMENT.CHANNELS = len(state["mask_branch.start.bias"]) // max(cells, 1)
    return cfg


def _fit(state: dict, cfg: CfgNode) -> dict:
    """The parameters under the names and in the shapes that the model of `cfg` has them."""
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if missing := sorted(name for name in shapes if name.removeprefix(_PREFIX) not in state):
        raise ConversionError(f"the model of this structure also has {missing[0]}, and the file nothing for it")
    fitted = {}
    for name, value in state.items():
        shape = shapes.get(_PREFIX + name)
        # The coarse mask inside a SharpMask is kept, though its model has none.
        if shape is None and not name.startswith("mask_branch.predictor."):
            raise ConversionError(f"the file also has {name}, and the model of this structure nothing for it")
        if shape is not None and shape.numel() != value.numel():
            raise ConversionError(f"{name} has {value.numel()} values, {tuple(shape)} were expected")
        fitted[_PREFIX + name] = value if shape is None else value.reshape(shape)
    return fitted


def save_torch7_model(model: Torch7Model, output: Union[str, Path]) -> Path:
    """Write a checkpoint for MODEL.WEIGHTS and, beside it, the config that runs it.

    Args:
        model: from `convert_torch7`.
        output: path of the checkpoint, with suffix .pth, by which Detectron2 knows its format.

    Returns:
        path of the config: the same name with suffix .yaml.

    Raises:
        ValueError: another suffix.
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
    """Where `save_torch7_model` writes the config of a checkpoint.

    Raises:
        ValueError: the name of the checkpoint does not end in .pth.
    """
    if Path(output).suffix != ".pth":
        raise UserError(f"--output {output}: the name of a checkpoint ends in .pth")
    return Path(output).with_suffix(".yaml")


def _changes(cfg: CfgNode, default: CfgNode) -> dict:
    """The keys of `cfg` whose values are not the default, nested as there."""
    changes = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            value = _changes(value, default[key])
        if value != default[key] and value != {}:
            changes[key] = value
    return changes
