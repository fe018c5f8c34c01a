"""Packed checkpoints: half precision, and every value once."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import pytest
import torch
from sharpmask_d2.checkpoint import pack, read_checkpoint, save_packed
from sharpmask_d2.errors import UserError


def write(path, state) -> int:
    save_packed(pack([state]), str(path))
    return path.stat().st_size


def test_parameters_of_equal_values_are_written_once(tmp_path):
    torch.manual_seed(0)
    decoder, other = torch.randn(200, 100), torch.randn(200, 100)
    one = write(tmp_path / "one.pth", {"generator.weight": decoder})
    copied = write(tmp_path / "copied.pth", {"generator.weight": decoder, "head.weight": decoder.clone()})
    both = write(tmp_path / "both.pth", {"generator.weight": decoder, "head.weight": other})
    assert copied < one + 1000
    assert both > 1.9 * one
    read = read_checkpoint(str(tmp_path / "copied.pth"))["model"]
    assert torch.equal(read["head.weight"], decoder.half())
    assert torch.equal(read["generator.weight"], decoder.half())


def test_equal_bytes_of_another_shape_or_type_stay_what_they_are(tmp_path):
    state = {"flat": torch.zeros(4), "square": torch.zeros(2, 2), "count": torch.zeros(4, dtype=torch.int16)}
    save_packed(pack([state]), str(tmp_path / "packed.pth"))
    read = read_checkpoint(str(tmp_path / "packed.pth"))["model"]
    assert [(value.shape, value.dtype) for value in read.values()] == [
        ((4,), torch.float16),
        ((2, 2), torch.float16),
        ((4,), torch.int16),
    ]


def test_models_that_differ_in_a_parameter_are_refused():
    with pytest.raises(UserError, match=r"do not belong together: a differs"):
        pack([{"a": torch.ones(2)}, {"a": torch.zeros(2)}])
    with pytest.raises(UserError, match=r"a has values that float16 cannot hold"):
        pack([{"a": torch.full((2,), 1e9)}])
