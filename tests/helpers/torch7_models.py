"""Draws DeepMask and SharpMask models as objects of torch7_writer.py, in the structure of the published files but with narrow heads.

Shape letters: C channels.
"""

from dataclasses import dataclass, field

import numpy as np
from torch7_writer import Object, Storage, Tensor

# First entry of the views' sizes: the batch of training, whatever is fed later.
BATCH = 32
_WIDTHS = 64, 128, 256
_SKIP_WIDTHS = 64, 64, 64, 32


@dataclass
class _Draw:
    """Makes modules; the parameters of those made since the last `flatten` wait for a common storage."""

    rng: np.random.Generator
    norm: str
    namespace: str
    element: str
    flat: bool
    pending: list = field(default_factory=list)

    @property
    def type(self) -> str:
        return f"torch.{self.element}Tensor"

    def module(self, class_name: str, **fields) -> Object:
        return Object(class_name, _type=self.type, output=self.empty(), gradInput=self.empty(), **fields)

    def empty(self) -> Tensor:
        return Tensor(Storage(np.empty(0, np.float32), self.element), [])

    def constant(self, array) -> Tensor:
        array = np.asarray(array, np.float32)
        return Tensor(Storage(array, self.element), array.shape)

    def parameters(self, **arrays) -> dict:
        """Fields of parameters, and of their gradients with what memory happened to hold."""
        fields = {}
        for name, array in arrays.items():
            garbage = self.rng.choice(np.array([0, 1e-30, -3e20, np.nan], np.float32), array.shape)
            garbage.flat[0] = np.nan
            for key, values in ((name, array), (f"grad{name.capitalize()}", garbage)):
                fields[key] = self.constant(values)
                self.pending.append((key, fields[key]))
        return fields

    def flatten(self) -> None:
        """Move the parameters drawn into one storage, their gradients into another."""
        for gradients in (False, True):
            tensors = [tensor for key, tensor in self.pending if key.startswith("grad") == gradients]
            if self.flat and tensors:
                storage = Storage(np.concatenate([tensor.storage.array for tensor in tensors]), self.element)
                offset = 1
                for tensor in tensors:
                    tensor.storage, tensor.offset, offset = storage, offset, offset + len(tensor.storage.array)
        self.pending.clear()

    # ------------------------------------------------------------------ modules

    def container(self, name: str, *modules) -> Object:
        return self.module(f"nn.{name}", modules=list(modules))

    def sequential(self, *modules) -> Object:
        return self.container("Sequential", *modules)

    def uniform(self, shape, low: float, high: float) -> np.ndarray:
        return self.rng.uniform(low, high, shape).astype(np.float32)

    def he(self, shape, gain: float = 2) -> np.ndarray:
        return (self.rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))).astype(np.float32)

    def linear(self, inputs: int, outputs: int, gain: float = 1) -> Object:
        weight, bias = self.he((outputs, inputs), gain), self.uniform(outputs, -0.5, 0.5)
        return self.module("nn.Linear", **self.parameters(weight=weight, bias=bias))

    def convolution(self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False) -> Object:
        arrays = {"weight": self.he((outputs, inputs, kernel, kernel))}
        if bias:
            arrays["bias"] = self.uniform(outputs, -0.5, 0.5)
        sizes = {"nInputPlane": inputs, "nOutputPlane": outputs, "kW": kernel, "kH": kernel, "dW": stride, "dH": stride}
        return self.module(
            f"{self.namespace}.SpatialConvolution", **sizes, padW=0, padH=0, groups=1, **self.parameters(**arrays)
        )

    def mirrored(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> Object:
        """A convolution without bias in its wrap."""
        convolution = self.convolution(inputs, outputs, kernel, stride)
        return self.sequential(self.padding("Symmetric", kernel // 2), convolution)

    def padding(self, kind: str, pad: int) -> Object:
        return self.module(f"nn.Spatial{kind}Padding", pad_l=pad, pad_r=pad, pad_t=pad, pad_b=pad)

    def relu(self, inplace: bool = True) -> Object:
        return self.module(f"{self.namespace}.ReLU", inplace=inplace)

    def normalisation(self, channels: int, gain: float = 1) -> Object:
        a, b = gain * self.uniform(channels, 0.7, 1.3), self.uniform(channels, -0.3, 0.3)
        if self.norm == "nn.SpatialConstDiagonal":
            a, b = (v.reshape(1, channels, 1, 1) for v in (a, b))
            return self.module(self.norm, inplace=True, a=self.constant(a), b=self.constant(b))
        if self.norm == "inn.ConstAffine":
            return self.module(self.norm, inplace=True, a=self.constant(a), b=self.constant(b))
        mean, var = self.uniform(channels, -0.3, 0.3), self.uniform(channels, 0.5, 1.5)
        statistics = {"running_mean": self.constant(mean), "running_var": self.constant(var)}
        return self.module(self.norm, eps=1e-5, affine=True, **statistics, **self.parameters(weight=a, bias=b))

    def view(self, *sizes: int) -> Object:
        sizes = (BATCH, *sizes)
        size = Storage(np.array(sizes, np.int64))
        return self.module("nn.View", size=size, numElements=int(np.prod(sizes)))

    def dropout(self) -> Object:
        return self.module("nn.Dropout", p=0.5, v2=True, train=True)

    # ------------------------------------------------------------------ networks

    def block(self, inputs: int, width: int, stride: int, bottleneck: bool) -> Object:
        outputs = width * (4 if bottleneck else 1)
        if bottleneck:
            chain = [
                *(self.convolution(inputs, width, 1), self.normalisation(width), self.relu()),
                *(self.mirrored(width, width, 3, stride), self.normalisation(width), self.relu()),
                self.convolution(width, outputs, 1),
            ]
        else:
            chain = [
                *(self.mirrored(inputs, width, 3, stride), self.normalisation(width), self.relu()),
                self.mirrored(width, width, 3),
            ]
        # A small gain, so that sums over many blocks keep their order.
        chain.append(self.normalisation(outputs, gain=0.4))
        if inputs == outputs and stride == 1:
            shortcut = self.module("nn.Identity")
        else:
            shortcut = self.sequential(
                self.convolution(inputs, outputs, 1, stride), self.normalisation(outputs, gain=0.7)
            )
        both = self.container("ConcatTable", self.sequential(*chain), shortcut)
        return self.sequential(both, self.module("nn.CAddTable", inplace=True), self.relu())

    def stage(self, inputs: int, number: int, blocks: int, bottleneck: bool) -> Object:
        width, stride = _WIDTHS[number], 1 if number == 0 else 2
        outputs = width * (4 if bottleneck else 1)
        rest = [self.block(outputs, width, 1, bottleneck) for _ in range(blocks - 1)]
        return self.sequential(self.block(inputs, width, stride, bottleneck), *rest)

    def trunk(self, blocks, bottleneck: bool, reduced: int, embed: int, cells: int) -> Object:
        channels = _skip_channels(bottleneck)
        pooling = {"kW": 3, "kH": 3, "dW": 2, "dH": 2, "padW": 1, "padH": 1, "ceil_mode": False}
        inputs = [64, channels[2], channels[1]]
        trunk = self.sequential(
            self.mirrored(3, 64, 7, 2),
            self.normalisation(64),
            self.relu(),
            self.module("nn.SpatialMaxPooling", **pooling),
            *(self.stage(inputs[i], i, blocks[i], bottleneck) for i in range(3)),
            self.padding("Zero", -1),
            self.convolution(channels[0], reduced, 1, bias=True),
            self.relu(inplace=False),
            self.view(reduced * cells * cells),
            self.linear(reduced * cells * cells, embed),
        )
        self.flatten()
        return trunk

    def mask_branch(self, embed: int, coarse: int, side: int) -> Object:
        resampling = {"mode": "bilinear", "mode_c": 2, "owidth": side, "oheight": side, "yDim": 2, "xDim": 3}
        branch = self.sequential(
            self.sequential(self.linear(embed, coarse * coarse)),
            self.sequential(
                self.module("nn.Copy"),
                self.view(coarse, coarse),
                self.module("nn.SpatialReSamplingEx", **resampling),
                self.view(side * side),
                self.module("nn.Copy"),
            ),
        )
        self.flatten()
        return branch

    def score_branch(self, embed: int, score: int) -> Object:
        branch = self.sequential(
            self.dropout(),
            self.linear(embed, score),
            self.module("nn.Threshold", threshold=0, val=1e-6, inplace=False),
            self.dropout(),
            self.linear(score, 1),
        )
        self.flatten()
        return branch

    def chain(self, widths) -> list:
        """Mirrored 3x3 convolutions with bias through the channel counts, ReLU between them; not wrapped."""
        modules = []
        for inputs, outputs in zip(widths, widths[1:]):
            convolution = self.convolution(inputs, outputs, 3, bias=True)
            modules += [self.padding("Symmetric", 1), convolution, self.relu(inplace=False)]
        # Blind to what is even: the last modules have so few channels that a common sign would leave ReLU nothing or all.
        weight = convolution.fields["weight"].storage.array.reshape(-1, 9)
        weight -= weight.mean(1, keepdims=True)
        return modules[:-1]


def _skip_channels(bottleneck: bool) -> list:
    """C of the maps that go to the horizontal nets, deepest first."""
    return [width * (4 if bottleneck else 1) for width in reversed(_WIDTHS)] + [64]


def draw_deepmask(
    rng: np.random.Generator,
    *,
    blocks=(2, 2, 2),
    bottleneck: bool = False,
    reduced: int = 8,
    embed: int = 12,
    score: int = 10,
    window: int = 160,
    coarse: int = 56,
    side: int = 112,
    norm: str = "nn.SpatialConstDiagonal",
    namespace: str = "cudnn",
    element: str = "Cuda",
    flat: bool = True,
) -> Object:
    """An nn.DeepMask whose numbers keep order 1, and whose gradients hold NaN.

    Args:
        rng: all numbers come from it.
        blocks: in each of the three stages; (2, 2, 2) is ResNet-18.
        bottleneck: as in ResNet-50, of which (3, 4, 6) are the blocks.
        reduced: channels of the 1x1 convolution after the stages.
        embed: outputs of the trunk.
        score: hidden units of the score branch.
        window: side of the patch without its context, in pixels; the network takes 32 more.
        coarse, side: of the mask before and after resizing, in pixels.
        norm: "nn.SpatialConstDiagonal", "inn.ConstAffine", "nn.SpatialBatchNormalization" or "cudnn.SpatialBatchNormalization".
        namespace: "cudnn" or "nn", of convolutions and ReLUs.
        element: "Cuda" or "Float".
        flat: parameters of a branch are views of one storage, their gradients of another, as in the published files.
    """
    draw = _Draw(rng, norm, namespace, element, flat)
    cells = window // 16
    return Object(
        "nn.DeepMask",
        trunk=draw.trunk(blocks, bottleneck, reduced, embed, cells),
        maskBranch=draw.mask_branch(embed, coarse, side),
        scoreBranch=draw.score_branch(embed, score),
        fSz=cells,
    )


def draw_sharpmask(
    deepmask: Object,
    rng: np.random.Generator,
    *,
    km: int = 16,
    namespace: str = "cudnn",
    element: str = "Cuda",
    flat: bool = False,
) -> Object:
    """An nn.SharpMask on the branches of a drawn DeepMask, which both then share.

    Args:
        deepmask: of `draw_deepmask`.
        rng: all numbers come from it.
        km: channels of the first mask encoding, a multiple of 16.
        namespace, element: as of `draw_deepmask`.
        flat: the refinement's parameters share one storage; the published files do not do that.
    """
    draw = _Draw(rng, "", namespace, element, flat)
    trunk, cells = deepmask.fields["trunk"], deepmask.fields["fSz"]
    reducing, embedding = trunk.fields["modules"][8], trunk.fields["modules"][11]
    channels = _skip_channels(reducing.fields["nInputPlane"] == 1024)
    embed = embedding.fields["weight"].sizes[0]

    netvs = {0: draw.sequential(draw.linear(embed, km * cells * cells), draw.view(km, cells, cells))}
    neths, refs = {}, {0: netvs[0]}
    for k in range(1, 5):
        width = km // 2 ** (k - 1)
        crop = [draw.padding("Zero", -(2 ** (k - 1)))] if k > 1 else []
        neths[k] = draw.sequential(*crop, *draw.chain([channels[k - 1], _SKIP_WIDTHS[k - 1], width, width // 2]))
        netvs[k] = draw.sequential(*draw.chain([width, width, width // 2]))
        last = []
        if k == 4:
            side = cells * 16
            last = [*draw.chain([width // 2, 1]), draw.view(side * side)]
        refs[k] = draw.sequential(
            draw.container("ParallelTable", neths[k], netvs[k]),
            # As written by CAddTable(2).
            draw.module("nn.CAddTable", inplace=2),
            draw.relu(inplace=False),
            draw.module("nn.SpatialUpSamplingNearest", scale_factor=2),
            *last,
        )
    draw.flatten()
    return Object(
        "nn.SharpMask",
        neths=neths,
        netvs=netvs,
        trunk=trunk,
        skpos=[8, 6, 5, 3],
        maskBranchDM=deepmask.fields["maskBranch"],
        inps={},
        scoreBranch=deepmask.fields["scoreBranch"],
        refs=refs,
        km=km,
        ks=km,
        fSz=cells,
    )


def published(model: Object) -> dict:
    """What a published file holds: {model, config}, with the options of training that fit the model."""
    sharpmask = model.class_name == "nn.SharpMask"
    branch = model.fields["maskBranchDM" if sharpmask else "maskBranch"]
    view, resampling = branch.fields["modules"][1].fields["modules"][1:3]
    window = model.fields["fSz"] * 16
    config = {
        "iSz": window,
        "oSz": int(view.fields["size"].array[1]),
        "gSz": window if sharpmask else resampling.fields["owidth"],
        "km": model.fields.get("km", 32),
        "ks": model.fields.get("ks", 32),
        "batch": BATCH,
        "shift": 16,
        "scale": 0.25,
        "hfreq": 0.0 if sharpmask else 0.5,
        "lr": 0,
        "wd": 5e-4,
        "momentum": 0.9,
        "maxload": 4000,
        "testmaxload": 500,
        "maxepoch": 300,
        "nthreads": 2,
        "gpu": 1,
        "seed": 1,
        "scratch": False,
        "reload": "",
        "dm": "pretrained/deepmask" if sharpmask else "",
        "datadir": "data/",
        "rundir": "exps/run",
    }
    return {"model": model, "config": config}
