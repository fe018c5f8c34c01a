"""Draws DeepMask and SharpMask models as objects of torch7_writer.py, in the structure of the published files but with narrow heads."""

from dataclasses import dataclass

import numpy as np
from torch7_writer import Object, Storage, Tensor

# The first size of the files' views: the batch size of training.
BATCH = 32
_WIDTHS = 64, 128, 256
_SKIP_WIDTHS = 64, 64, 64, 32


@dataclass
class _Draw:
    """Makes modules; their numbers come from `rng`, and their gradients are NaN."""

    rng: np.random.Generator
    norm: str
    namespace: str
    element: str

    def module(self, class_name: str, **fields) -> Object:
        return Object(class_name, _type=f"torch.{self.element}Tensor", **fields)

    def tensor(self, array: np.ndarray) -> Tensor:
        return Tensor(Storage(np.asarray(array, np.float32), self.element), array.shape)

    def parameters(self, **arrays: np.ndarray) -> dict:
        """Fields of parameters and of their gradients."""
        gradients = {f"grad{name.capitalize()}": np.full(array.shape, np.nan) for name, array in arrays.items()}
        return {name: self.tensor(array) for name, array in {**arrays, **gradients}.items()}

    def container(self, name: str, *modules: Object) -> Object:
        return self.module(f"nn.{name}", modules=list(modules))

    def sequential(self, *modules: Object) -> Object:
        return self.container("Sequential", *modules)

    def uniform(self, shape, low: float, high: float) -> np.ndarray:
        return self.rng.uniform(low, high, shape)

    def normal(self, shape, gain: float) -> np.ndarray:
        return self.rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))

    def linear(self, inputs: int, outputs: int) -> Object:
        weight, bias = self.normal((outputs, inputs), 1), self.uniform(outputs, -0.5, 0.5)
        return self.module("nn.Linear", **self.parameters(weight=weight, bias=bias))

    def convolution(self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False) -> Object:
        arrays = {"weight": self.normal((outputs, inputs, kernel, kernel), 2)}
        if bias:
            arrays["bias"] = self.uniform(outputs, -0.5, 0.5)
        sizes = {"nInputPlane": inputs, "nOutputPlane": outputs, "kW": kernel, "kH": kernel, "dW": stride, "dH": stride}
        name = f"{self.namespace}.SpatialConvolution"
        return self.module(name, **sizes, padW=0, padH=0, groups=1, **self.parameters(**arrays))

    def mirrored(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> Object:
        """A convolution without bias behind its mirrored padding."""
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
        if self.norm in ("nn.SpatialConstDiagonal", "inn.ConstAffine"):
            return self.module(self.norm, inplace=True, a=self.tensor(a), b=self.tensor(b))
        mean, var = self.uniform(channels, -0.3, 0.3), self.uniform(channels, 0.5, 1.5)
        statistics = {"running_mean": self.tensor(mean), "running_var": self.tensor(var)}
        return self.module(self.norm, eps=1e-5, affine=True, **statistics, **self.parameters(weight=a, bias=b))

    def view(self, *sizes: int) -> Object:
        size = Storage(np.array([BATCH, *sizes], np.int64))
        return self.module("nn.View", size=size, numElements=int(np.prod(size.array)))

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
        # The gain is small, so that sums over many blocks keep their order of magnitude.
        chain.append(self.normalisation(outputs, gain=0.4))
        shortcut = self.module("nn.Identity")
        if inputs != outputs or stride != 1:
            shortcut = self.sequential(self.convolution(inputs, outputs, 1, stride), self.normalisation(outputs, 0.7))
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
        return self.sequential(
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

    def mask_branch(self, embed: int, coarse: int) -> Object:
        side = 2 * coarse
        resampling = {"mode": "bilinear", "mode_c": 2, "owidth": side, "oheight": side, "yDim": 2, "xDim": 3}
        resize = [
            self.view(coarse, coarse),
            self.module("nn.SpatialReSamplingEx", **resampling),
            self.view(side * side),
        ]
        return self.sequential(
            self.sequential(self.linear(embed, coarse * coarse)),
            self.sequential(self.module("nn.Copy"), *resize, self.module("nn.Copy")),
        )

    def score_branch(self, embed: int, score: int) -> Object:
        threshold = self.module("nn.Threshold", threshold=0, val=1e-6, inplace=False)
        hidden, last = self.linear(embed, score), self.linear(score, 1)
        return self.sequential(self.dropout(), hidden, threshold, self.dropout(), last)

    def chain(self, widths: list) -> list:
        """Mirrored 3x3 convolutions with bias through the channel counts and ReLU between them, as a list of modules."""
        modules = []
        for inputs, outputs in zip(widths, widths[1:]):
            convolution = self.convolution(inputs, outputs, 3, bias=True)
            modules += [self.padding("Symmetric", 1), convolution, self.relu(inplace=False)]
        # Without its mean: a common sign of the last, few channels would leave ReLU nothing or everything.
        weight = convolution.fields["weight"].storage.array.reshape(-1, 9)
        weight -= weight.mean(1, keepdims=True)
        return modules[:-1]


def _skip_channels(bottleneck: bool) -> list:
    """Channels of the maps that go to the horizontal nets, deepest first."""
    return [width * (4 if bottleneck else 1) for width in reversed(_WIDTHS)] + [64]


def draw_deepmask(
    rng: np.random.Generator,
    *,
    blocks=(2, 2, 2),
    bottleneck: bool = False,
    reduced: int = 8,
    embed: int = 12,
    score: int = 10,
    window: int = 64,
    coarse: int = 12,
    norm: str = "nn.SpatialConstDiagonal",
    namespace: str = "cudnn",
    element: str = "Cuda",
) -> Object:
    """An nn.DeepMask whose activations have the order of magnitude of 1, and whose gradients are NaN.

    Args:
        rng: all numbers come from it.
        blocks: in each of the three stages; (2, 2, 2) is ResNet-18.
        bottleneck: as in ResNet-50, of which (3, 4, 6) are the blocks.
        reduced: channels of the 1x1 convolution after the stages.
        embed: outputs of the trunk.
        score: hidden units of the score branch.
        window: side of the patch without its context, in pixels; the network takes 32 more.
        coarse: side of the mask before it is resized to twice as much, in pixels.
        norm: "nn.SpatialConstDiagonal", "inn.ConstAffine", "nn.SpatialBatchNormalization" or "cudnn.SpatialBatchNormalization".
        namespace: "cudnn" or "nn", of convolutions and ReLUs.
        element: "Cuda" or "Float".
    """
    draw = _Draw(rng, norm, namespace, element)
    cells = window // 16
    return Object(
        "nn.DeepMask",
        trunk=draw.trunk(blocks, bottleneck, reduced, embed, cells),
        maskBranch=draw.mask_branch(embed, coarse),
        scoreBranch=draw.score_branch(embed, score),
        fSz=cells,
    )


def draw_sharpmask(deepmask: Object, rng: np.random.Generator, *, channels: int = 16) -> Object:
    """An nn.SharpMask on the branches of a drawn DeepMask, which both then share.

    Args:
        deepmask: from `draw_deepmask`.
        rng: all numbers come from it.
        channels: of the first mask encoding, a multiple of 16.
    """
    trunk, cells = deepmask.fields["trunk"], deepmask.fields["fSz"]
    reducing, embedding = trunk.fields["modules"][8], trunk.fields["modules"][11]
    element = trunk.fields["_type"][len("torch.") : -len("Tensor")]
    draw = _Draw(rng, "", reducing.class_name.partition(".")[0], element)
    skip_channels = _skip_channels(reducing.fields["nInputPlane"] == 1024)
    embed = embedding.fields["weight"].sizes[0]
    netvs = {0: draw.sequential(draw.linear(embed, channels * cells * cells), draw.view(channels, cells, cells))}
    neths, refs = {}, {0: netvs[0]}
    for k in range(1, 5):
        width = channels // 2 ** (k - 1)
        crop = [draw.padding("Zero", -(2 ** (k - 1)))] if k > 1 else []
        neths[k] = draw.sequential(*crop, *draw.chain([skip_channels[k - 1], _SKIP_WIDTHS[k - 1], width, width // 2]))
        netvs[k] = draw.sequential(*draw.chain([width, width, width // 2]))
        last = [*draw.chain([width // 2, 1]), draw.view((16 * cells) ** 2)] if k == 4 else []
        refs[k] = draw.sequential(
            draw.container("ParallelTable", neths[k], netvs[k]),
            # As CAddTable(2) writes it.
            draw.module("nn.CAddTable", inplace=2),
            draw.relu(inplace=False),
            draw.module("nn.SpatialUpSamplingNearest", scale_factor=2),
            *last,
        )
    return Object(
        "nn.SharpMask",
        neths=neths,
        netvs=netvs,
        refs=refs,
        trunk=trunk,
        maskBranchDM=deepmask.fields["maskBranch"],
        scoreBranch=deepmask.fields["scoreBranch"],
        skpos=[8, 6, 5, 3],
        inps={},
        km=channels,
        ks=channels,
        fSz=cells,
    )


def published(model: Object) -> dict:
    """What a published file holds besides: the options of training, of which conversion needs none."""
    return {"model": model, "config": {"iSz": 16 * model.fields["fSz"], "gpu": 1, "rundir": "exps/run"}}
