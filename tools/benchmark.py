#!/usr/bin/env python
"""Speed and memory, of cutting training patches, of proposals of full images, and of detectors.

    tools/benchmark.py sampler --annotations train.json --image-root images --config-file configs/deepmask_lite0.yaml
    tools/benchmark.py proposals --config-file configs/sharpmask_lite0.yaml --weights model_final.pth --dtype bfloat16
    tools/benchmark.py detector --config-file configs/detection/multipath_lite0.yaml

Set OMP_NUM_THREADS for the number of threads; `sampler` uses one process and one thread, which is what a worker has.
"""

import argparse
import resource
import statistics
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import cv2
import numpy as np
import sharpmask_d2
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from sharpmask_d2.data import PatchMapper
from sharpmask_d2.data.loader import PatchBatches
from sharpmask_d2.engine import ARCHITECTURE, Trainer
from sharpmask_d2.evaluation.proposal_evaluation import write_json
from sharpmask_d2.modeling.layers import fold_batch_norm


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampler = commands.add_parser("sampler", help="patches per second of one worker")
    sampler.add_argument("--annotations", required=True, help="COCO annotation file")
    sampler.add_argument("--image-root", required=True, help="folder of the images")
    sampler.add_argument("--batches", type=int, default=20, help="timed batches, after one that is not")
    proposals = commands.add_parser("proposals", help="seconds and memory per image")
    detector = commands.add_parser("detector", help="seconds and memory per image and per training step")
    for command in (proposals, detector):
        command.add_argument("--weights", help="checkpoint; without it, random weights, whatever the config says")
        command.add_argument("--image-size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
        command.add_argument("--num-proposals", type=int, help="default: that of the config")
        command.add_argument("--repeat", type=int, default=5, help="timed runs, after one that is not")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network")
    for command in (sampler, proposals, detector):
        command.add_argument("--config-file", help="default: the defaults of sharpmask_d2/config.py")
        command.add_argument("--output", help="write the figures to this JSON file")
        command.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values: KEY VALUE ...")
    args = parser.parse_args()
    if getattr(args, "batches", 1) < 1 or getattr(args, "repeat", 1) < 1:
        parser.error("--batches and --repeat must be at least 1")
    for path in (args.config_file, *(getattr(args, name, None) for name in ("weights", "annotations", "image_root"))):
        if path and not Path(path).exists():
            parser.error(f"there is no {path}")
    return args


def setup(args: argparse.Namespace):
    cfg = get_cfg()
    sharpmask_d2.add_sharpmask_config(cfg)
    # Without a config file it is the network of proposals.
    cfg.MODEL.META_ARCHITECTURE = ARCHITECTURE
    cfg.INPUT.FORMAT = "RGB"
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if args.config_file:
        device = cfg.MODEL.DEVICE
        cfg.merge_from_file(args.config_file)
        cfg.MODEL.DEVICE = device
    cfg.merge_from_list(args.opts)
    return cfg


def benchmark_sampler(args: argparse.Namespace, cfg) -> dict:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    dicts = [d for d in load_coco_json(args.annotations, args.image_root) if d["annotations"]]
    mapper = PatchMapper(cfg, category_weights={})
    stream = iter(PatchBatches(dicts, mapper, images_per_batch=cfg.SOLVER.IMS_PER_BATCH, seed=max(cfg.SEED, 0)))
    next(stream)
    started = time.perf_counter()
    patches = sum(len(image["patches"]) for _ in range(args.batches) for image in next(stream))
    seconds = time.perf_counter() - started
    return {
        "patches per second": patches / seconds,
        "images per second": args.batches * cfg.SOLVER.IMS_PER_BATCH / seconds,
        "patches": patches,
        "seconds": seconds,
    }


def benchmark_proposals(args: argparse.Namespace, cfg) -> dict:
    if args.num_proposals:
        cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = args.num_proposals
    model = Trainer.build_model(cfg)
    if args.weights:
        DetectionCheckpointer(model).load(args.weights)
    # In this order: checkpoints hold the batch norms.
    fold_batch_norm(model).eval()
    image = draw_image(*args.image_size).to(model.device)
    cuda = model.device.type == "cuda"
    forget_peak(model.device)
    loaded = peak_megabytes(model.device)
    forward, rle, counts = [], [], []
    for _ in range(args.repeat + 1):
        started = clock(cuda)
        with torch.no_grad(), autocast(model.device, args.dtype):
            (output,) = model([{"image": image}])
        between = clock(cuda)
        output["proposals"].proposal_masks.rle()
        ended = clock(cuda)
        forward.append(between - started)
        rle.append(ended - between)
        counts.append(len(output["proposals"]))
    peak = peak_megabytes(model.device)
    # The first image warms up.
    forward, rle = forward[1:], rle[1:]
    return {
        "seconds per image": statistics.median(a + b for a, b in zip(forward, rle)),
        "  network and boxes": statistics.median(forward),
        "  RLE": statistics.median(rle),
        "proposals": counts[-1],
        "peak memory above the loaded model (MB)": peak - loaded,
        "peak memory (MB)": peak,
    }


def benchmark_detector(args: argparse.Namespace, cfg) -> dict:
    model = Trainer.build_model(cfg)
    if args.weights:
        DetectionCheckpointer(model).load(args.weights)
    image, size = draw_image(*args.image_size), tuple(args.image_size)
    inputs = {"image": image}
    if cfg.MODEL.LOAD_PROPOSALS:
        datasets = cfg.DATASETS
        count = args.num_proposals or datasets.PRECOMPUTED_PROPOSAL_TOPK_TEST
        inputs["proposals"] = draw_proposals(count, size)
    figures = {}
    cuda = model.device.type == "cuda"
    model.eval()
    forget_peak(model.device)
    seconds = []
    for _ in range(args.repeat + 1):
        started = clock(cuda)
        with torch.no_grad(), autocast(model.device, args.dtype):
            model([inputs])
        seconds.append(clock(cuda) - started)
    figures["seconds per image"] = statistics.median(seconds[1:])
    figures["peak memory of an image (MB)"] = peak_megabytes(model.device)
    model.train()
    optimizer = Trainer.build_optimizer(cfg, model)
    objects = Instances(size)
    objects.gt_boxes = draw_proposals(8, size).proposal_boxes
    objects.gt_classes = torch.arange(8) % cfg.MODEL.ROI_HEADS.NUM_CLASSES
    batch = [{**inputs, "instances": objects} for _ in range(cfg.SOLVER.IMS_PER_BATCH)]
    if cfg.MODEL.LOAD_PROPOSALS:
        for item in batch:
            item["proposals"] = draw_proposals(datasets.PRECOMPUTED_PROPOSAL_TOPK_TRAIN, size)
    forget_peak(model.device)
    seconds = []
    with EventStorage():
        for _ in range(args.repeat + 1):
            started = clock(cuda)
            with autocast(model.device, args.dtype):
                loss = sum(model(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(clock(cuda) - started)
    figures["seconds per training step"] = statistics.median(seconds[1:])
    figures["images per training step"] = len(batch)
    figures["peak memory of training (MB)"] = peak_megabytes(model.device)
    return figures


def draw_proposals(count: int, size: tuple) -> Instances:
    """Boxes of all sizes in an image of (height, width): the same for the same count and size."""
    rng = np.random.default_rng(0)
    height, width = size
    sides = np.exp(rng.uniform(np.log(16), np.log(min(size)), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes(torch.from_numpy(np.concatenate([corners, corners + sides], axis=1)).float())
    proposals.objectness_logits = torch.linspace(2, -2, count)
    return proposals


def autocast(device: torch.device, dtype: str):
    return torch.autocast(device.type, dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def clock(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_megabytes(device: torch.device) -> float:
    """The most memory so far: of the process, or on a GPU what torch has allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # macOS counts bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak(device: torch.device) -> None:
    """From now on, count from what is in use, not from what loading needed for a moment; on a CPU, Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def draw_image(height: int, width: int) -> torch.Tensor:
    """(3, H, W) uint8 with structure of all sizes: the same for the same size."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.float32)
    for cells in (2, 5, 12, 40):
        noise = rng.uniform(0, 64, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST)
    return torch.from_numpy(image.astype(np.uint8).transpose(2, 0, 1).copy())


def main() -> None:
    args = parse_args()
    cfg = setup(args)
    commands = {"sampler": benchmark_sampler, "proposals": benchmark_proposals, "detector": benchmark_detector}
    figures = commands[args.command](args, cfg)
    print(f"{Path(args.config_file).name if args.config_file else 'defaults'}, {torch.get_num_threads()} thread(s)")
    for name, value in figures.items():
        print(f"{name:<42}{value:>12.{0 if isinstance(value, int) else 3}f}")
    if args.output:
        write_json({name.strip(): value for name, value in figures.items()}, args.output)


if __name__ == "__main__":
    main()
