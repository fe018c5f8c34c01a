"""The least time that a computation can take: its operations, counted by fvcore, divided by the best rate measured on the machine."""

import logging
import time

import torch
import torch.nn.functional as F
from detectron2.utils.analysis import FlopCountAnalysis

# By type of device: large enough to be bound by arithmetic, small enough to take a fraction of a second.
_MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
_CONV = {"cpu": {"batch": 2, "channels": 256, "side": 64}, "cuda": {"batch": 64, "channels": 256, "side": 64}}


def count_operations(model, inputs: list) -> int:
    """Floating-point operations of a forward pass: two for every multiply-add of convolutions and matrix products.

    Args:
        model: a Detectron2 model in evaluation mode.
        inputs: what it is called with.
    """
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    counted = FlopCountAnalysis(model, inputs)
    counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return int(2 * counted.total())


@torch.no_grad()
def best_rates(device: torch.device, dtype: torch.dtype, *, repeat: int = 5) -> dict:
    """Operations per second of a large matrix product and of a large 3x3 channels_last convolution, the best of `repeat` runs each.

    Args:
        device, dtype: where and in what the network computes.

    Returns:
        {"matrix product": rate, "3x3 convolution": rate}.
    """
    matrix_side, conv = _MATRIX_SIDE[device.type], _CONV[device.type]
    a, b = (torch.randn(matrix_side, matrix_side, device=device, dtype=dtype) for _ in range(2))
    channels, side = conv["channels"], conv["side"]
    x = torch.randn(conv["batch"], channels, side, side, device=device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    works = {
        "matrix product": (2 * matrix_side**3, lambda: a @ b),
        "3x3 convolution": (2 * 9 * channels * x.numel(), lambda: F.conv2d(x, weight, padding=1)),
    }
    return {name: operations / _fastest(work, device, repeat) for name, (operations, work) in works.items()}


def _fastest(work, device: torch.device, repeat: int) -> float:
    seconds = []
    # The first run warms up.
    for _ in range(repeat + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
