#!/usr/bin/env python
"""Speed and memory, of cutting training patches, of proposals of full images, and of detectors.

    tools/benchmark.py sampler --annotations train.json --image-root images --config-file configs/deepmask_lite0.yaml
    tools/benchmark.py proposals --model sharpmask_fpn_lite0 --config-file configs/sharpmask_R_50.yaml --dtype float32 bfloat16
    tools/benchmark.py detector --config-file configs/detection/multipath_lite0.yaml

`proposals` measures everything it is given in turn, A B A B, so that what else the machine does meets all alike. Beside the stages of each
it prints its limit: floating-point operations, counted by fvcore, over the best rate that a large matrix product or 3x3 convolution
reaches.

Set OMP_NUM_THREADS for the number of threads; `sampler` uses one process and one thread, which is what a worker has.
"""

import argparse
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from multiprocessing import get_context
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
from sharpmask_d2 import model_zoo
from sharpmask_d2.benchmark import STAGES, StageClock, best_rates, count_operations
from sharpmask_d2.checkpoint import StrictCheckpointer
from sharpmask_d2.data import PatchMapper
from sharpmask_d2.data.loader import PatchBatches
from sharpmask_d2.engine import ALONE, ARCHITECTURE, Trainer
from sharpmask_d2.evaluation.proposal_evaluation import write_json
from sharpmask_d2.modeling.layers import fold_batch_norm
from tabulate import tabulate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampler = commands.add_parser("sampler", help="patches per second of one worker")
    sampler.add_argument("--annotations", required=True, help="COCO annotation file")
    sampler.add_argument("--image-root", required=True, help="folder of the images")
    sampler.add_argument("--batches", type=int, default=20, help="timed batches, after one that is not")
    proposals = commands.add_parser("proposals", help="seconds and memory per image")
    detector = commands.add_parser("detector", help="seconds and memory per image and per training step")
    dtypes = {"choices": ("float32", "bfloat16"), "help": "of the network"}
    proposals.add_argument(
        "--model", action="append", default=[], choices=model_zoo.names(), help="a packaged model; may be repeated"
    )
    proposals.add_argument(
        "--config-file", action="append", default=[], help="a config, with random weights; may be repeated"
    )
    proposals.add_argument("--dtype", nargs="+", default=["float32"], **dtypes)
    proposals.add_argument("--num-proposals", type=int, nargs="+", default=[0], help="default: that of the config")
    detector.add_argument("--weights", help="checkpoint; without it, random weights, whatever the config says")
    detector.add_argument("--num-proposals", type=int, help="default: that of the config")
    detector.add_argument("--dtype", default="float32", **dtypes)
    for command in (proposals, detector):
        command.add_argument("--image-size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
        command.add_argument("--repeat", type=int, default=5, help="timed runs, after one that is not")
    for command in (sampler, detector):
        command.add_argument("--config-file", help="default: the defaults of sharpmask_d2/config.py")
    for command in (sampler, proposals, detector):
        command.add_argument("--output", help="write the figures to this JSON file")
        command.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values: KEY VALUE ...")
    args = parser.parse_args()
    if getattr(args, "batches", 1) < 1 or getattr(args, "repeat", 1) < 1:
        parser.error("--batches and --repeat must be at least 1")
    if args.command == "proposals" and not args.model + args.config_file:
        parser.error("name a --model or a --config-file")
    files = args.config_file if args.command == "proposals" else [args.config_file]
    for path in (*files, *(getattr(args, name, None) for name in ("weights", "annotations", "image_root"))):
        if path and not Path(path).exists():
            parser.error(f"there is no {path}")
    return args


def setup(config_file: str, opts: list):
    cfg = get_cfg()
    sharpmask_d2.add_sharpmask_config(cfg)
    # Without a config file it is the network of proposals.
    cfg.MODEL.META_ARCHITECTURE = ARCHITECTURE
    cfg.INPUT.FORMAT = "RGB"
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.MODEL.DEVICE = model_zoo.device()
    cfg.merge_from_list(opts)
    return cfg


def benchmark_sampler(args: argparse.Namespace) -> dict:
    cfg = setup(args.config_file, args.opts)
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


class ProposalRun:
    """One model, in one dtype, with one number of proposals: timed run by run."""

    def __init__(self, name: str, cfg, model, num_proposals: int, dtype: str, image: torch.Tensor):
        self.name, self.model, self.num_proposals, self.dtype = name, model, num_proposals, dtype
        self.image = image.to(model.device)
        self.generator = getattr(model, "pyramid", None) or model.proposal_generator
        self.generator.num_proposals = num_proposals
        self.laps, self.counts = [], []
        with autocast(model.device, dtype):
            self.operations = count_operations(model, [{"image": self.image}])
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            self.peak = fresh.submit(peak_above_model, cfg.clone(), num_proposals, dtype, image).result()

    @torch.no_grad()
    def __call__(self) -> None:
        self.generator.num_proposals = self.num_proposals
        with StageClock(self.model) as clock:
            with clock.stage("windows"), autocast(self.model.device, self.dtype):
                (output,) = self.model([{"image": self.image}])
            with clock.stage("RLE"):
                output["proposals"].proposal_masks.rle()
        self.laps.append(clock.seconds)
        self.counts.append(len(output["proposals"]))

    def figures(self, rates: dict) -> dict:
        # The first run warms up.
        laps = self.laps[1:]
        seconds = [sum(lap.values()) for lap in laps]
        limit = self.operations / max(rates.values())
        total = statistics.median(seconds)
        return {
            "model": self.name,
            "dtype": self.dtype,
            "proposals": self.counts[-1],
            "seconds": total,
            "fastest": min(seconds),
            "slowest": max(seconds),
            **{stage: statistics.median(lap.get(stage, 0.0) for lap in laps) for stage in (*STAGES, "RLE")},
            "GFLOP": self.operations / 1e9,
            "limit": limit,
            "times the limit": total / limit,
            "peak MB": self.peak,
        }


def benchmark_proposals(args: argparse.Namespace) -> dict:
    configs = [(name, merged(model_zoo.get(name), args.opts)) for name in args.model]
    for path in args.config_file:
        cfg = setup(path, args.opts)
        # Random weights: those that the config starts from may not be there.
        cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.PRETRAINED = ""
        configs.append((Path(path).stem, cfg))
    if others := [name for name, cfg in configs if cfg.MODEL.META_ARCHITECTURE not in ALONE]:
        sys.exit(f"{others} make no proposals alone, their MODEL.META_ARCHITECTURE is none of {ALONE}: see `detector`")
    image = draw_image(*args.image_size)
    runs = []
    for name, cfg in configs:
        model = build(cfg)
        for count in args.num_proposals:
            count = count or cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS
            runs += [ProposalRun(name, cfg, model, count, dtype, image) for dtype in args.dtype]
    rates = {dtype: best_rates(model.device, getattr(torch, dtype)) for dtype in args.dtype}
    for _ in range(args.repeat + 1):
        for run in runs:
            run()
    return {"rates": rates, "runs": [run.figures(rates[run.dtype]) for run in runs]}


def build(cfg):
    model = Trainer.build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    # In this order: checkpoints hold the batch norms.
    return fold_batch_norm(model).eval()


@torch.no_grad()
def peak_above_model(cfg, count: int, dtype: str, image: torch.Tensor) -> float:
    """Most memory that two images take beside the loaded model, MB; for a process that has done nothing else."""
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = count
    model = build(cfg)
    forget_peak(model.device)
    loaded = peak_megabytes(model.device)
    for _ in range(2):
        with autocast(model.device, dtype):
            (output,) = model([{"image": image}])
        output["proposals"].proposal_masks.rle()
    return peak_megabytes(model.device) - loaded


def merged(cfg, opts: list):
    cfg.merge_from_list(opts)
    return cfg


def print_proposals(figures: dict) -> None:
    for dtype, rates in figures["rates"].items():
        print(f"{dtype}: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s by a {name}" for name, rate in rates.items()))
    rows = figures["runs"]
    print(tabulate([row.values() for row in rows], list(rows[0]), tablefmt="pipe", floatfmt=".3f"))


def benchmark_detector(args: argparse.Namespace) -> dict:
    cfg = setup(args.config_file, args.opts)
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
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a process starts with that of the one that started it.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    # macOS counts bytes.
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


def print_figures(figures: dict) -> None:
    for name, value in figures.items():
        print(f"{name:<42}{value:>12.{0 if isinstance(value, int) else 3}f}")


def main() -> None:
    args = parse_args()
    commands = {
        "sampler": (benchmark_sampler, print_figures),
        "proposals": (benchmark_proposals, print_proposals),
        "detector": (benchmark_detector, print_figures),
    }
    measure, show = commands[args.command]
    figures = measure(args)
    print(f"{torch.get_num_threads()} thread(s)")
    show(figures)
    if args.output:
        write_json(figures, args.output)


if __name__ == "__main__":
    main()
