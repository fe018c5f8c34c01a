"""Proposals of an exported model against those of torch."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import cv2
import numpy as np
import pytest
from detectron2.data.transforms import ResizeShortestEdge
from photograph_files import draw_photograph
from PIL import Image
from pycocotools import mask as mask_util
from sharpmask_d2 import model_zoo
from sharpmask_d2.config import merge_options
from sharpmask_d2.errors import UserError
from sharpmask_d2.inference import ProposalPredictor
from sharpmask_d2.runtime import Predictor
from sharpmask_d2.runtime.backends import Decoder
from sharpmask_d2.runtime.predictor import resize

# Landscape, portrait and square; smaller, larger and exactly as large as the model's images; sides that are odd, multiples of 128 or tiny.
SIZES = [
    (96, 128),
    (128, 128),
    (128, 192),
    (192, 128),
    (129, 257),
    (255, 127),
    (40, 300),
    (300, 40),
    (17, 23),
    (480, 640),
    (333, 500),
    (64, 65),
]
NUM_PROPOSALS = 60


def draw(size: tuple) -> np.ndarray:
    """(H, W, 3) uint8 BGR."""
    noise = np.random.default_rng(size[0]).normal(0, 6, (*size, 3))
    return (cv2.resize(draw_photograph(), size[::-1]) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def predictors(exported):
    cfg = model_zoo.get_config()
    # As the fixture `exported` has them.
    sides = ["INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 192]
    merge_options(
        cfg, tuple(map(str, ["MODEL.DEVICE", "cpu", "MODEL.SHARPMASK.TEST.NUM_PROPOSALS", NUM_PROPOSALS, *sides]))
    )
    return ProposalPredictor(cfg), Predictor(exported, threads=1, num_proposals=NUM_PROPOSALS)


@pytest.mark.parametrize("size", SIZES)
def test_proposals_equal_those_of_torch(predictors, size):
    image = draw(size)
    expected, found = (predictor(image) for predictor in predictors)
    assert found.masks.image_size == size
    assert len(expected) > 5
    assert len(found.scores) == len(expected)
    np.testing.assert_allclose(found.objectness_logits, expected.objectness_logits.numpy(), atol=1e-2)
    # Proposals of nearly equal scores may change places.
    rles, others = found.masks.rle(), expected.proposal_masks.rle()
    overlaps = mask_util.iou(rles, others, [0] * len(others))
    assert np.median(overlaps.max(axis=0)) > 0.999
    assert (overlaps.max(axis=0) > 0.97).mean() > 0.95
    pixels = mask_util.decode(rles).transpose(2, 0, 1)
    assert (pixels == found.masks.paste()).all()
    for mask, (x0, y0, x1, y1) in zip(pixels, found.boxes):
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        assert (x0, y0, x1, y1) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


@pytest.mark.parametrize("size", [*SIZES, (1000, 31)])
def test_images_are_resized_as_by_detectron2(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for sides in ((128, 192), (480, 640)):
        expected = ResizeShortestEdge([sides[0]] * 2, sides[1]).get_transform(image).apply_image(image)
        assert (resize(image, *sides) == expected).all()


def test_files_grey_images_and_numbers_of_proposals_are_accepted(predictors, exported, tmp_path):
    predictor, image = predictors[1], draw((96, 128))
    path = tmp_path / "image.png"
    Image.fromarray(image[:, :, ::-1]).save(path)
    assert (predictor(path).boxes == predictor(image).boxes).all()
    grey = image[:, :, 0]
    assert (predictor(grey).boxes == predictor(np.repeat(grey[:, :, None], 3, axis=2)).boxes).all()
    few = Predictor(exported, threads=1, num_proposals=5)(image)
    assert 0 < len(few.scores) <= 5
    assert (few.scores[:-1] >= few.scores[1:]).all()
    with pytest.raises(UserError, match="num_proposals is 0"):
        Predictor(exported, num_proposals=0)


def test_what_is_missing_is_named(exported, tmp_path):
    with pytest.raises(UserError, match=r"model\.json"):
        Predictor(tmp_path)
    (tmp_path / "model.json").write_text((exported / "model.json").read_text())
    with pytest.raises(UserError, match=r"there is no .*encoder\.onnx"):
        Predictor(tmp_path)


class FixedGraph:
    """A decoder that takes exactly 3 and 2 windows; the mask of a window is its left edge."""

    def run(self, inputs):
        *_, windows, coarse = inputs
        assert len(windows) == 3
        assert len(coarse) == 2
        return [np.broadcast_to(x[:, :1, None], (len(x), 4, 4)) for x in (windows, coarse)]


@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (2, 0), (1, 2), (7, 1), (0, 5)])
def test_decoders_of_fixed_numbers_of_windows_decode_any_number(counts):
    windows, coarse = (np.arange(4 * n, dtype=np.float32).reshape(n, 4) + 1 for n in counts)
    masks = Decoder(FixedGraph(), (3, 2))([], np.array([8, 8]), windows, coarse)
    assert masks[:, 0, 0].tolist() == [*windows[:, 0], *coarse[:, 0]]
