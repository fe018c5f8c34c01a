"""How often a forward pass waits for a GPU, counted without one: tensors without data cannot be waited for, and moves from the CPU show."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import contextlib

import pytest
import torch
from detectron2.modeling import build_model
from sharpmask_d2.modeling import layers
from sharpmask_d2.modeling.image_pyramid import generator as image_pyramid
from sharpmask_d2.modeling.layers import fold_batch_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Moves(TorchDispatchMode):
    """Keeps the names of operators that read a tensor of the CPU and write one without data."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        read, written = (
            {x.device.type for x in tree_leaves(tree) if isinstance(x, torch.Tensor)} for tree in ((args, kwargs), out)
        )
        if "cpu" in read and "meta" in written:
            self.names.append(str(function))
        return out


def _run(cfg, monkeypatch) -> tuple:
    """Logits of masks, the devices of what was asked for its values, and names of moves from the CPU."""
    asked, moves = [], _Moves()

    def split(cells, sizes):
        asked.append(cells.device.type)
        (_, columns), rest = sizes[-1], len(sizes) - 1
        return [(cells[:1] * 0, cells[:1] * 0)] * rest + [(cells[rest:] // columns, cells[rest:] % columns)]

    monkeypatch.setattr(image_pyramid, "split_cells", split)
    # What follows, boxes and runs of masks, counts pixels.
    monkeypatch.setattr(image_pyramid, "build_proposals", lambda scores, masks, **_: masks.logits)
    monkeypatch.setattr(layers.torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    pyramid = fold_batch_norm(build_model(cfg).eval()).pyramid.to("meta")
    with moves:
        logits = pyramid(torch.empty(3, 90, 120, device="meta"))
    return logits, asked, moves.names


@pytest.mark.parametrize("name", ["sharpmask", "none"])
@pytest.mark.parametrize("resizing", ["antialiased", "released"])
def test_an_image_pyramid_waits_once_before_its_masks(tiny_cfg, monkeypatch, name, resizing):
    tiny_cfg.MODEL.SHARPMASK.REFINEMENT.NAME = name
    tiny_cfg.MODEL.SHARPMASK.RESIZING = resizing
    logits, asked, moves = _run(tiny_cfg, monkeypatch)
    assert logits.device.type == "meta"
    assert len(logits) == tiny_cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS
    assert asked == ["meta"]
    assert moves == []


def test_moves_from_the_cpu_are_seen(tiny_cfg, monkeypatch):
    plain = image_pyramid.cell_windows

    def moving(level, ys, xs, *geometry):
        return plain(level, ys + torch.zeros(len(ys), dtype=torch.long).to(ys.device), xs, *geometry)

    monkeypatch.setattr(image_pyramid, "cell_windows", moving)
    _, _, moves = _run(tiny_cfg, monkeypatch)
    assert moves == ["aten._to_copy.default"] * 2
