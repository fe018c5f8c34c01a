"""Training on several datasets: their shares of an epoch, and annotations that are not exhaustive."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import argparse
import itertools
import math
from collections import Counter
from itertools import islice

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from sharpmask_d2.data import add_dataset_option, build_jitter_train_loader, register_datasets
from sharpmask_d2.data.mixing import MixingSampler, epoch_counts, load_datasets
from sharpmask_d2.modeling.feature_pyramid.grid import PyramidWindows
from sharpmask_d2.modeling.feature_pyramid.labels import enlarged, score_targets


@pytest.mark.parametrize(
    ("sizes", "shares", "expected"),
    [
        ([100, 50], [1.0, 1.0], [100, 50]),
        ([100, 500], [1.0, 0.2], [100, 25]),
        ([100, 500, 500], [1.0, 0.25, 0.25], [100, 50, 50]),
        # A dataset that is smaller than its share is used as a whole.
        ([100, 10], [1.0, 0.5], [100, 10]),
        ([80, 20, 500], [1.0, 0.4, 0.5], [80, 20, 100]),
    ],
)
def test_no_dataset_exceeds_its_share_of_an_epoch(sizes, shares, expected):
    counts = epoch_counts(sizes, shares)
    assert counts == expected
    assert all(count <= share * sum(counts) + 1e-9 for count, share in zip(counts, shares))


def test_shares_that_leave_nothing_for_other_datasets_are_named():
    with pytest.raises(ValueError, match="add up to 1 or more"):
        epoch_counts([10, 100, 100], [1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="at least one dataset has to be without a limit"):
        epoch_counts([10], [0.5])


def test_an_epoch_has_all_images_without_a_limit_and_part_of_the_others_in_turn():
    sizes, counts = [6, 9], [6, 3]
    stream = list(islice(MixingSampler(sizes=sizes, counts=counts, seed=3), 27))
    epochs = [stream[i : i + 9] for i in (0, 9, 18)]
    for epoch in epochs:
        assert sorted(n for n in epoch if n < 6) == list(range(6))
    assert sorted(n for epoch in epochs for n in epoch if n >= 6) == list(range(6, 15))
    assert stream == list(islice(MixingSampler(sizes=sizes, counts=counts, seed=3), 27))
    assert stream != list(islice(MixingSampler(sizes=sizes, counts=counts, seed=4), 27))


def test_the_option_of_a_dataset_says_that_it_is_not_exhaustive(make_dataset, tmp_path, tiny_cfg):
    drawn = make_dataset(tmp_path, num_images=1)
    files = [str(drawn.annotations), str(drawn.image_root)]
    parser = argparse.ArgumentParser()
    add_dataset_option(parser)
    args = parser.parse_args(
        ["--dataset", "option_whole", *files, "--dataset", "option_partial:not-exhaustive", *files]
    )
    register_datasets(args.dataset)
    tiny_cfg.DATASETS.TRAIN = ["option_whole", "option_partial"]
    dicts, _ = load_datasets(tiny_cfg)
    assert [image["exhaustive"] for image in dicts] == [True, False]
    for name in tiny_cfg.DATASETS.TRAIN:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def two_datasets(tiny_cfg, make_dataset, tmp_path):
    names = ["mixing_whole", "mixing_partial"]
    for seed, name in enumerate(names):
        drawn = make_dataset(tmp_path / name, num_images=3, seed=seed, objects_per_image=1)
        register_datasets([(name, str(drawn.annotations), str(drawn.image_root))])
    cfg = tiny_cfg.clone()
    cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = names
    cfg.DATASETS.NOT_EXHAUSTIVE = names[1:]
    cfg.INPUT.SCALE_JITTER.ENABLED = True
    cfg.INPUT.SCALE_JITTER.SIDE, cfg.INPUT.SCALE_JITTER.CROP = 320, 64
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 1
    yield cfg
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_cuts_of_images_that_are_not_exhaustively_annotated_have_an_object(two_datasets):
    dicts, sizes = load_datasets(two_datasets)
    assert sizes == [3, 3]
    assert [image["exhaustive"] for image in dicts] == [True] * 3 + [False] * 3
    empty = Counter()
    for batch in islice(build_jitter_train_loader(two_datasets), 60):
        (image,) = batch
        instances = image["instances"]
        partial = "mixing_partial" in image["file_name"]
        assert instances.has("gt_exhaustive") == partial
        assert not partial or instances.gt_exhaustive.tolist() == [False] * len(instances)
        empty[partial] += len(instances) == 0
    # Cuts of a fifth of the image's side often miss its only object.
    assert empty[False] > 0
    assert empty[True] == 0


@pytest.mark.parametrize("key", ["NOT_EXHAUSTIVE", "MAX_SHARES"])
def test_options_for_datasets_outside_training_are_named(two_datasets, key):
    two_datasets.DATASETS[key] = ["elsewhere"] if key == "NOT_EXHAUSTIVE" else [["elsewhere", 0.5]]
    with pytest.raises(ValueError, match=rf"DATASETS\.{key} names \['elsewhere'\]"):
        build_jitter_train_loader(two_datasets)


@pytest.mark.parametrize("exhaustive", [True, False])
def test_targets_of_scores_against_a_slow_definition(exhaustive):
    geometry = PyramidWindows(strides=[4, 8, 16], window_cells=[5, 7], object_share=0.8)
    boxes = torch.tensor([[20.0, 30.0, 84.0, 70.0], [90.0, 90.0, 120.0, 118.0], [10.0, 100.0, 16.0, 104.0]])
    sizes = [(32, 32), (16, 16), (8, 8)]
    numbers = torch.arange(2 * sum(y * x for y, x in sizes))
    targets = score_targets(
        geometry.windows(geometry.cells(numbers, sizes)),
        enlarged(boxes, geometry.smallest_object),
        share=geometry.object_share,
        negative_shift=0.8 * 32 / 92,
        negative_octaves=1.0,
        exhaustive=exhaustive,
    )
    number, seen = 0, set()
    # Larger side of an object whose canonical window has 160 pixels, as in the label rule.
    canonical = 92
    for stride, (rows, columns) in zip([4, 8, 16], sizes):
        for cells in (5, 7):
            for row, column in itertools.product(range(rows), range(columns)):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                # Larger side of an object for which this window is canonical.
                fitting = 0.8 * cells * stride
                target, known = 0.0, exhaustive
                for x0, y0, x1, y1 in boxes.tolist():
                    # The smallest window, of five cells of four pixels, stands for smaller objects, too.
                    side = max(x1 - x0, y1 - y0, 16.0)
                    away = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2))
                    distance = max(away * canonical / fitting / 32, abs(math.log2(fitting / side)) / 1.0)
                    target = max(target, min(1, max(0, (1 - distance) / 0.75)))
                    known |= away + fitting * 160 / canonical / 2 <= side * 160 / canonical / 2 + 1e-4
                expected = target if known or target > 0 else -1
                assert targets[number] == pytest.approx(expected, abs=1e-4), (stride, cells, row, column)
                seen.add("between" if 0 < expected < 1 else expected)
                number += 1
    assert seen == {"between", 0, 1} | (set() if exhaustive else {-1})
