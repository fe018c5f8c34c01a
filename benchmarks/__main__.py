"""Measures speed and memory of proposals, runs over photographs, evaluation, training, cutting training patches, and detectors.

    python -m benchmarks proposals --model sharpmask_bifpn_lite0 --config-file configs/sharpmask_R_50.yaml --dtype float32 bfloat16
    python -m benchmarks runtimes --model-folder exported/ --model-folder exported_int8/ --annotations instances.json --image-root images
    python -m benchmarks growth --model sharpmask_bifpn_lite0 --model sharpmask_lite0 --dtype bfloat16 --plot growth.png
    python -m benchmarks photographs --input photographs/ --model sharpmask_bifpn_lite0 --dtype bfloat16
    python -m benchmarks evaluation
    python -m benchmarks training --config-file configs/deepmask_lite0.yaml --config-file configs/sharpmask_bifpn_lite0.yaml
    python -m benchmarks sampler --annotations train.json --image-root images --config-file configs/deepmask_lite0.yaml
    python -m benchmarks detector --config-file configs/detection/multipath_lite0.yaml

`proposals` and `training` interleave everything that they measure, A B A B, so that other work on the machine affects all of it;
`proposals` runs each model in a process of its own and resizes images as its config says. For each they print its lower limit:
floating-point operations, counted by fvcore, divided by the best rate that a large matrix product or 3x3 convolution reaches. A training
step has three times the operations of its forward pass, or fewer where layers are frozen. `growth` shows how seconds per image grow with
the area of the image, the scales of an image pyramid, the number of proposals and the batch size.

All commands run on a GPU where there is one; append MODEL.DEVICE cpu for the CPU. Set OMP_NUM_THREADS for the number of threads; `sampler`
uses one process and one thread, as a worker does.
"""

import argparse
import os
from pathlib import Path

# Read when torch is loaded; see docs/performance.md, "Shared machines".
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from sharpmask_d2 import model_zoo
from sharpmask_d2.cli.command import positive, run
from sharpmask_d2.config import merge_file, merge_options, read_config
from sharpmask_d2.errors import UserError
from sharpmask_d2.evaluation.proposal_evaluation import write_json
from sharpmask_d2.inference.caching import keep_between_images
from sharpmask_d2.inference.image_files import list_annotated
from sharpmask_d2.inference.preparation import DTYPES
from sharpmask_d2.io.outputs import OutputError, check_outputs
from sharpmask_d2.modeling.meta_arch import ALONE, ARCHITECTURE
from tabulate import tabulate

from . import (
    ProposalRun,
    TrainingRun,
    draw_image,
    in_turn,
    measure_growth,
    plot_growth,
    time_detector,
    time_encoding,
    time_photographs,
    time_runtimes,
    time_sampler,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampler = commands.add_parser("sampler", help="patches per second of one worker")
    sampler.add_argument("--annotations", required=True, help="COCO annotation file")
    sampler.add_argument("--image-root", required=True, help="folder of the images")
    sampler.add_argument("--batches", type=positive, default=20, help="timed batches, after one that is not")
    proposals = commands.add_parser("proposals", help="seconds and memory per image")
    runtimes = commands.add_parser(
        "runtimes", help="seconds, memory and recall of exported models, beside the model in torch"
    )
    photographs = commands.add_parser("photographs", help="seconds of each stage of a run over photographs")
    photographs.add_argument("--input", nargs="+", required=True, help="image files and folders")
    photographs.add_argument("--model", default=model_zoo.DEFAULT, choices=model_zoo.names(), help="a packaged model")
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
    for command in (growth, photographs):
        command.add_argument("--dtype", default="float32", **dtypes)
    runtimes.add_argument("--model", default=model_zoo.DEFAULT, choices=model_zoo.names(), help="packaged model")
    runtimes.add_argument("--dtype", nargs="*", default=["float32"], **dtypes)
    runtimes.add_argument("--model-folder", action="append", default=[], help="exported model; may be repeated")
    runtimes.add_argument("--annotations", required=True, help="COCO annotation file of the photographs")
    runtimes.add_argument("--image-root", required=True, help="folder of the photographs")
    runtimes.add_argument(
        "--timed", type=positive, default=20, help="photographs that are timed; recall is that of all"
    )
    runtimes.add_argument("--no-recall", action="store_true", help="only time")
    runtimes.add_argument("--num-proposals", type=int, nargs="+", default=[0], help="default: that of the model")
    evaluation.add_argument("--num-proposals", type=positive, default=1000)
    evaluation.add_argument("--num-objects", type=positive, default=10)
    proposals.add_argument("--num-proposals", type=int, nargs="+", default=[0], help="default: that of the config")
    proposals.add_argument(
        "--batch-size", type=positive, nargs="+", default=[1], help="images that are measured together"
    )
    detector.add_argument("--weights", help="checkpoint; without it, random weights, whatever the config says")
    detector.add_argument("--num-proposals", type=positive, help="default: that of the config")
    detector.add_argument("--dtype", default="float32", **dtypes)
    for command in (proposals, evaluation, training, detector):
        command.add_argument("--image-size", type=positive, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    for command in (proposals, photographs, growth, evaluation, training, detector):
        command.add_argument("--repeat", type=positive, default=5, help="timed runs, after one that is not")
    for command in (sampler, detector):
        command.add_argument("--config-file", help="default: the defaults of sharpmask_d2/config.py")
    for command in commands.choices.values():
        command.add_argument("--output", help="write the figures to this JSON file")
    for command in (sampler, proposals, photographs, growth, training, detector):
        command.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values: KEY VALUE ...")
    args = parser.parse_args()
    files = getattr(args, "config_file", None)
    if args.command != "runtimes" and isinstance(files, list) and not files + getattr(args, "model", []):
        parser.error("name a --model or a --config-file")
    files = files if isinstance(files, list) else [files]
    inputs = [*files, *(getattr(args, name, None) for name in ("weights", "annotations", "image_root"))]
    inputs += getattr(args, "input", [])
    for path in inputs:
        if path and not Path(path).exists():
            parser.error(f"there is no {path}")
    try:
        check_outputs({"--output": args.output, "--plot": getattr(args, "plot", None)}, inputs=inputs)
    except OutputError as error:
        parser.error(str(error))
    return args


def setup(config_file: str, opts: list):
    cfg = read_config()
    # Without a config file it is the network of proposals.
    cfg.MODEL.META_ARCHITECTURE = ARCHITECTURE
    cfg.INPUT.FORMAT = "RGB"
    if config_file:
        merge_file(cfg, config_file)
    cfg.MODEL.DEVICE = model_zoo.default_device()
    merge_options(cfg, opts)
    return cfg


def benchmark_sampler(args: argparse.Namespace) -> dict:
    cfg = setup(args.config_file, args.opts)
    return time_sampler(cfg, annotations=args.annotations, image_root=args.image_root, batches=args.batches)


def benchmark_proposals(args: argparse.Namespace) -> dict:
    image = draw_image(*args.image_size).permute(1, 2, 0).numpy()
    runs = [
        ProposalRun(name, cfg, image, num_proposals=count, dtype=dtype, compiled=compiled, batch_size=batch_size)
        for name, cfg in read_configs(args)
        for dtype in args.dtype
        for count in args.num_proposals
        for batch_size in args.batch_size
        for compiled in (False, True)[: 1 + args.compiled]
    ]
    figures = figures_in_turn(runs, args)
    for measured in runs:
        measured.close()
    return figures


def benchmark_photographs(args: argparse.Namespace) -> dict:
    cfg = merged(model_zoo.get_config(args.model), args.opts)
    return time_photographs(cfg, args.input, dtype=args.dtype, repeat=args.repeat)


def benchmark_training(args: argparse.Namespace) -> dict:
    configs = [(Path(path).stem, without_weights(setup(path, args.opts))) for path in args.config_file]
    runs = [TrainingRun(name, cfg, dtype, args.image_size) for name, cfg in configs for dtype in args.dtype]
    return figures_in_turn(runs, args)


def figures_in_turn(runs: list, args: argparse.Namespace) -> dict:
    device = torch.device(setup(None, args.opts).MODEL.DEVICE)
    rates = in_turn(runs, args.dtype, device=device, repeat=args.repeat)
    return {"rates": rates, "runs": [run.figures(rates[run.dtype]) for run in runs]}


def benchmark_growth(args: argparse.Namespace) -> dict:
    curves = [
        {"model": name, "dtype": args.dtype, **measure_growth(cfg, dtype=args.dtype, repeat=args.repeat)}
        for name, cfg in read_configs(args)
    ]
    if args.plot:
        plot_growth(curves, args.plot)
    return {"curves": curves}


def benchmark_evaluation(args: argparse.Namespace) -> dict:
    seconds = time_encoding(
        image_size=args.image_size,
        num_proposals=args.num_proposals,
        num_objects=args.num_objects,
        repeat=args.repeat,
    )
    return {f"{name} (seconds)": value for name, value in seconds.items()}


def benchmark_detector(args: argparse.Namespace) -> dict:
    return time_detector(
        setup(args.config_file, args.opts),
        weights=args.weights,
        image_size=args.image_size,
        num_proposals=args.num_proposals,
        dtype=args.dtype,
        repeat=args.repeat,
    )


def benchmark_runtimes(args: argparse.Namespace) -> dict:
    images = [(image.image_id, image.path) for image in list_annotated(args.annotations, args.image_root)]
    sources = [*((args.model, dtype) for dtype in args.dtype), *((folder, None) for folder in args.model_folder)]
    rows = time_runtimes(
        sources,
        images,
        None if args.no_recall else args.annotations,
        num_proposals=args.num_proposals,
        num_timed=args.timed,
    )
    return {"rates": {}, "runs": rows}


def read_configs(args: argparse.Namespace) -> list:
    """(name, config) of each model that makes proposals alone."""
    configs = [(name, merged(model_zoo.get_config(name), args.opts)) for name in args.model]
    for path in args.config_file:
        configs.append((Path(path).stem, without_weights(setup(path, args.opts))))
    if others := [name for name, cfg in configs if cfg.MODEL.META_ARCHITECTURE not in ALONE]:
        raise UserError(
            f"{others} make no proposals alone, their MODEL.META_ARCHITECTURE is none of {ALONE}: see `detector`"
        )
    return configs


def without_weights(cfg):
    # Random ones: those that the config starts from may not be there.
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.PRETRAINED = cfg.MODEL.SHARPMASK.TRUNK.PRETRAINED = ""
    return cfg


def merged(cfg, opts: list):
    merge_options(cfg, opts)
    return cfg


def print_runs(figures: dict) -> None:
    for dtype, rates in figures["rates"].items():
        print(f"{dtype}: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s by a {name}" for name, rate in rates.items()))
    rows = figures["runs"]
    print(tabulate([row.values() for row in rows], list(rows[0]), tablefmt="pipe", floatfmt=".3f"))


def print_growth(figures: dict) -> None:
    for curve in figures["curves"]:
        for axis, points in curve.items():
            if axis not in ("model", "dtype") and points:
                values = ", ".join(f"{at:g}: {seconds:.3f}" for at, seconds in points)
                print(f"{curve['model']}, {curve['dtype']}, seconds per image by {axis}: {values}")


def print_figures(figures: dict) -> None:
    for name, value in figures.items():
        print(f"{name:<42}{value:>12.{0 if isinstance(value, int) else 3}f}")


def main() -> None:
    args = parse_args()
    commands = {
        "sampler": (benchmark_sampler, print_figures),
        "proposals": (benchmark_proposals, print_runs),
        "runtimes": (benchmark_runtimes, print_runs),
        "photographs": (benchmark_photographs, print_figures),
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
    run(main)
