#!/usr/bin/env python
"""Speed and memory, of proposals of full images and their evaluation, of training and cutting its patches, and of detectors.

    tools/benchmark.py proposals --model sharpmask_fpn_lite0 --config-file configs/sharpmask_R_50.yaml --dtype float32 bfloat16
    tools/benchmark.py growth --model sharpmask_fpn_lite0 --model sharpmask_lite0 --dtype bfloat16 --plot growth.png
    tools/benchmark.py evaluation
    tools/benchmark.py training --config-file configs/deepmask_lite0.yaml --config-file configs/sharpmask_fpn_lite0.yaml
    tools/benchmark.py sampler --annotations train.json --image-root images --config-file configs/deepmask_lite0.yaml
    tools/benchmark.py detector --config-file configs/detection/multipath_lite0.yaml

`proposals` and `training` measure everything they are given in turn, A B A B, so that what else the machine does meets all alike;
`proposals` has each model in a process of its own, and resizes images as its config says. Beside each they print its limit:
floating-point operations, counted by fvcore, over the best rate that a large matrix product or 3x3 convolution reaches; a training step
has three times those of its forward pass, or less where layers are frozen. `growth` shows how seconds per image grow with the image's
area, the scales of an image pyramid, the number of proposals and that of images in a batch.

Set OMP_NUM_THREADS for the number of threads; `sampler` uses one process and one thread, which is what a worker has.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import sharpmask_d2
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data.datasets import load_coco_json
from detectron2.utils.events import EventStorage
from pycocotools import mask as mask_utils
from sharpmask_d2 import model_zoo
from sharpmask_d2.benchmark import (
    ProposalRun,
    best_rates,
    count_operations,
    draw_image,
    draw_objects,
    draw_proposals,
    forget_peak,
    peak_megabytes,
)
from sharpmask_d2.caching import keep_between_images
from sharpmask_d2.data import PatchMapper
from sharpmask_d2.data.loader import PatchBatches
from sharpmask_d2.engine import ALONE, ARCHITECTURE, Trainer
from sharpmask_d2.evaluation.proposal_evaluation import write_json
from sharpmask_d2.evaluation.recall import GroundTruth, RecallAccumulator
from sharpmask_d2.modeling.inference import DTYPES, autocast, prepare_for_inference
from sharpmask_d2.predictor import load_model
from sharpmask_d2.structures import WindowMasks
from tabulate import tabulate


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampler = commands.add_parser("sampler", help="patches per second of one worker")
    sampler.add_argument("--annotations", required=True, help="COCO annotation file")
    sampler.add_argument("--image-root", required=True, help="folder of the images")
    sampler.add_argument("--batches", type=int, default=20, help="timed batches, after one that is not")
    proposals = commands.add_parser("proposals", help="seconds and memory per image")
    growth = commands.add_parser("growth", help="seconds per image, as image, scales, proposals and batch grow")
    evaluation = commands.add_parser("evaluation", help="seconds for encoding and evaluating an image's proposals")
    training = commands.add_parser("training", help="seconds per step, patches and images per second")
    detector = commands.add_parser("detector", help="seconds and memory per image and per training step")
    dtypes = {"choices": DTYPES, "help": "of the network"}
    for command in (proposals, growth):
        command.add_argument(
            "--model", action="append", default=[], choices=model_zoo.names(), help="a packaged model; may be repeated"
        )
    for command in (proposals, growth, training):
        command.add_argument(
            "--config-file", action="append", default=[], help="a config, with random weights; may be repeated"
        )
    for command in (proposals, training):
        command.add_argument("--dtype", nargs="+", default=["float32"], **dtypes)
    proposals.add_argument(
        "--compile", action="store_true", dest="compiled", help="also measure each with its trunk compiled"
    )
    growth.add_argument("--plot", help="draw the curves into this picture")
    growth.add_argument("--dtype", default="float32", **dtypes)
    evaluation.add_argument("--num-proposals", type=int, default=1000)
    evaluation.add_argument("--num-objects", type=int, default=10)
    proposals.add_argument("--num-proposals", type=int, nargs="+", default=[0], help="default: that of the config")
    detector.add_argument("--weights", help="checkpoint; without it, random weights, whatever the config says")
    detector.add_argument("--num-proposals", type=int, help="default: that of the config")
    detector.add_argument("--dtype", default="float32", **dtypes)
    for command in (proposals, evaluation, training, detector):
        command.add_argument("--image-size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    for command in (proposals, growth, evaluation, training, detector):
        command.add_argument("--repeat", type=int, default=5, help="timed runs, after one that is not")
    for command in (sampler, detector):
        command.add_argument("--config-file", help="default: the defaults of sharpmask_d2/config.py")
    for command in commands.choices.values():
        command.add_argument("--output", help="write the figures to this JSON file")
    for command in (sampler, proposals, growth, training, detector):
        command.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values: KEY VALUE ...")
    args = parser.parse_args()
    if getattr(args, "batches", 1) < 1 or getattr(args, "repeat", 1) < 1:
        parser.error("--batches and --repeat must be at least 1")
    files = getattr(args, "config_file", None)
    if isinstance(files, list) and not files + getattr(args, "model", []):
        parser.error("name a --model or a --config-file")
    files = files if isinstance(files, list) else [files]
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


def benchmark_proposals(args: argparse.Namespace) -> dict:
    image = draw_image(*args.image_size).permute(1, 2, 0).numpy()
    runs = [
        ProposalRun(name, cfg, image, num_proposals=count, dtype=dtype, compiled=compiled)
        for name, cfg in read_configs(args)
        for dtype in args.dtype
        for count in args.num_proposals
        for compiled in (False, True)[: 1 + args.compiled]
    ]
    rates = in_turn(runs, args)
    figures = [run.figures(rates[run.dtype]) for run in runs]
    for run in runs:
        run.close()
    return {"rates": rates, "runs": figures}


def read_configs(args: argparse.Namespace) -> list:
    """(name, config) of each model that makes proposals alone."""
    configs = [(name, merged(model_zoo.get(name), args.opts)) for name in args.model]
    for path in args.config_file:
        configs.append((Path(path).stem, without_weights(setup(path, args.opts))))
    if others := [name for name, cfg in configs if cfg.MODEL.META_ARCHITECTURE not in ALONE]:
        sys.exit(f"{others} make no proposals alone, their MODEL.META_ARCHITECTURE is none of {ALONE}: see `detector`")
    return configs


def without_weights(cfg):
    # Random ones: those that the config starts from may not be there.
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.PRETRAINED = cfg.MODEL.SHARPMASK.TRUNK.PRETRAINED = ""
    return cfg


def build(cfg, dtype: str, *, compiled: bool = False):
    return prepare_for_inference(load_model(cfg), dtype, compiled=compiled)


def merged(cfg, opts: list):
    cfg.merge_from_list(opts)
    return cfg


def print_runs(figures: dict) -> None:
    for dtype, rates in figures["rates"].items():
        print(f"{dtype}: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s by a {name}" for name, rate in rates.items()))
    rows = figures["runs"]
    print(tabulate([row.values() for row in rows], list(rows[0]), tablefmt="pipe", floatfmt=".3f"))


class _Losses(torch.nn.Module):
    """The sum of a batch's losses as a function of nothing, which is what fvcore can trace."""

    def __init__(self, model, batch: list):
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return sum(self.model(self.batch).values())


class TrainingRun:
    """One config, in one dtype: a training step timed run by run, on the same batch."""

    def __init__(self, name: str, cfg, dtype: str, image_size: tuple):
        self.name, self.dtype = name, dtype
        torch.manual_seed(0)
        self.model = Trainer.build_model(cfg).train()
        self.optimizer = Trainer.build_optimizer(cfg, self.model)
        image, objects = draw_image(*image_size), draw_objects(8, tuple(image_size), 80)
        self.batch = [{"image": image, "instances": objects} for _ in range(cfg.SOLVER.IMS_PER_BATCH)]
        self.patches = 0
        if mapper := getattr(self.model, "mapper", None):
            # Cut before: it is the loader's work.
            self.batch = [
                mapper.cut_instances(image, objects, np.random.default_rng(i)) for i in range(len(self.batch))
            ]
            self.patches = sum(len(item["patches"]) for item in self.batch)
        # The backward pass has two products for each of the forward pass, where nothing is frozen.
        with EventStorage(), autocast(self.model.device, dtype):
            self.operations = 3 * count_operations(_Losses(self.model, self.batch), (torch.zeros(0),))
        self.laps = []

    def __call__(self) -> None:
        cuda = self.model.device.type == "cuda"
        started = clock(cuda)
        self._step()
        self.laps.append(clock(cuda) - started)

    def _step(self) -> None:
        with EventStorage(), autocast(self.model.device, self.dtype):
            loss = sum(self.model(self.batch).values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def figures(self, rates: dict) -> dict:
        seconds = statistics.median(self.laps[1:])
        limit = self.operations / max(rates.values())
        return {
            "config": self.name,
            "dtype": self.dtype,
            "seconds per step": seconds,
            "fastest": min(self.laps[1:]),
            "slowest": max(self.laps[1:]),
            "images per second": len(self.batch) / seconds,
            "patches per second": self.patches / seconds if self.patches else None,
            "limit": limit,
            "times the limit": seconds / limit,
        }


def benchmark_training(args: argparse.Namespace) -> dict:
    configs = [(Path(path).stem, without_weights(setup(path, args.opts))) for path in args.config_file]
    runs = [TrainingRun(name, cfg, dtype, args.image_size) for name, cfg in configs for dtype in args.dtype]
    rates = in_turn(runs, args)
    return {"rates": rates, "runs": [run.figures(rates[run.dtype]) for run in runs]}


def in_turn(runs: list, args: argparse.Namespace) -> dict:
    """All runs once to warm up, then `--repeat` times; the best rates of the machine by dtype, measured before and after."""
    device = torch.device(model_zoo.device())
    before = {dtype: best_rates(device, getattr(torch, dtype)) for dtype in args.dtype}
    for _ in range(args.repeat + 1):
        for run in runs:
            run()
    after = {dtype: best_rates(device, getattr(torch, dtype)) for dtype in args.dtype}
    return {
        dtype: {name: max(rate, after[dtype][name]) for name, rate in rates.items()} for dtype, rates in before.items()
    }


def benchmark_evaluation(args: argparse.Namespace) -> dict:
    size = tuple(args.image_size)
    truth = draw_objects(args.num_objects, size, 1)
    rles = [mask_utils.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in truth.gt_masks.tensor]
    boxes, areas = truth.gt_boxes.tensor.double().numpy(), mask_utils.area(rles).astype(float)
    objects = {"masks": rles, "boxes": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)}
    # Round masks in windows of all sizes, with some noise on their borders.
    side = 160
    steps = (torch.arange(side) + 0.5) / side - 0.5
    blob = 8 * (0.3 - (steps[:, None] ** 2 + steps**2).sqrt())
    logits = blob + 0.1 * torch.randn(args.num_proposals, side, side, generator=torch.Generator().manual_seed(0))
    windows = draw_proposals(args.num_proposals, size).proposal_boxes.tensor
    laps = {"runs and RLE": [], "masks against objects": [], "boxes against objects": []}
    for _ in range(args.repeat + 1):
        started = time.perf_counter()
        found = WindowMasks(logits, windows, size)
        masks = found.rle()
        laps["runs and RLE"].append(time.perf_counter() - started)
        corners = found.boxes().tensor.double().numpy()
        results = {"masks": masks, "boxes": np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)}
        for kind, regions in results.items():
            started = time.perf_counter()
            ground_truth = GroundTruth(objects[kind], areas=areas, is_crowd=np.zeros(len(areas), dtype=bool))
            RecallAccumulator(max_proposals=len(masks)).add(1, ground_truth, regions, np.arange(len(masks)))
            laps[f"{kind} against objects"].append(time.perf_counter() - started)
    return {f"{name} (seconds)": statistics.median(seconds[1:]) for name, seconds in laps.items()}


SIZES = ((240, 320), (360, 480), (480, 640), (720, 960), (960, 1280))
COUNTS = (100, 250, 500, 1000, 2000)
BATCHES = (1, 2, 4, 8)


@torch.no_grad()
def benchmark_growth(args: argparse.Namespace) -> dict:
    curves = []
    for name, cfg in read_configs(args):
        model = build(cfg, args.dtype)
        generator = getattr(model, "pyramid", None) or model.proposal_generator

        def seconds(image_size=(480, 640), batch=1, model=model) -> float:
            images = [{"image": draw_image(*image_size)}] * batch
            laps = []
            for _ in range(args.repeat + 1):
                started = clock(model.device.type == "cuda")
                with autocast(model.device, args.dtype):
                    outputs = model(images)
                for output in outputs:
                    output["proposals"].proposal_masks.rle()
                laps.append(clock(model.device.type == "cuda") - started)
            return statistics.median(laps[1:]) / batch

        curve = {"megapixels": [], "scales": [], "proposals": [], "images in a batch": []}
        for size in SIZES:
            curve["megapixels"].append((size[0] * size[1] / 1e6, seconds(image_size=size)))
        # Of the pyramid's scales the largest come last; a feature pyramid has none.
        scales = list(getattr(generator, "exponents", []))
        for number in range(1, len(scales) + 1):
            generator.exponents = scales[:number]
            curve["scales"].append((number, seconds()))
        most = generator.num_proposals
        for generator.num_proposals in COUNTS:
            curve["proposals"].append((generator.num_proposals, seconds()))
        generator.num_proposals = most
        for batch in BATCHES:
            curve["images in a batch"].append((batch, seconds(batch=batch)))
        curves.append({"model": name, "dtype": args.dtype, **curve})
    if args.plot:
        plot_growth(curves, args.plot)
    return {"curves": curves}


def plot_growth(curves: list, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [key for key in curves[0] if key not in ("model", "dtype")]
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3.2 * len(axes), 3), layout="constrained")
    for axis, panel in zip(axes, panels):
        for number, curve in enumerate(curves):
            if curve[axis]:
                style = {"color": f"C{number}", "marker": "o", "markersize": 3}
                panel.plot(*zip(*curve[axis]), label=curve["model"], **style)
        panel.set(xlabel=axis, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds per image")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def print_growth(figures: dict) -> None:
    for curve in figures["curves"]:
        for axis, points in curve.items():
            if axis not in ("model", "dtype") and points:
                values = ", ".join(f"{at:g}: {seconds:.3f}" for at, seconds in points)
                print(f"{curve['model']}, {curve['dtype']}, seconds per image by {axis}: {values}")


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
    objects = draw_objects(8, size, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
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


def clock(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def print_figures(figures: dict) -> None:
    for name, value in figures.items():
        print(f"{name:<42}{value:>12.{0 if isinstance(value, int) else 3}f}")


def main() -> None:
    args = parse_args()
    commands = {
        "sampler": (benchmark_sampler, print_figures),
        "proposals": (benchmark_proposals, print_runs),
        "growth": (benchmark_growth, print_growth),
        "evaluation": (benchmark_evaluation, print_figures),
        "training": (benchmark_training, print_runs),
        "detector": (benchmark_detector, print_figures),
    }
    measure, show = commands[args.command]
    keep_between_images()
    figures = measure(args)
    print(f"{torch.get_num_threads()} thread(s)")
    show(figures)
    if args.output:
        write_json(figures, args.output)


if __name__ == "__main__":
    main()
