"""Measures how seconds per image grow with the image's area, the scales of an image pyramid, the proposals and the images in a batch."""

import statistics
from pathlib import Path

import torch
from detectron2.config import CfgNode
from sharpmask_d2.inference.predictor import load_model
from sharpmask_d2.inference.preparation import autocast, prepare_for_inference
from sharpmask_d2.io.outputs import open_output

from .drawing import draw_image
from .turns import clock

SIZES = ((240, 320), (360, 480), (480, 640), (720, 960), (960, 1280))
COUNTS = (100, 250, 500, 1000, 2000)
BATCHES = (1, 2, 4, 8)


@torch.no_grad()
def measure_growth(cfg: CfgNode, *, dtype: str, repeat: int) -> dict:
    """Medians of seconds per image of a model that makes proposals alone.

    Args:
        cfg: of the model.
        dtype: see `inference.preparation.prepare_for_inference`.
        repeat: timed runs, after one that is not.

    Returns:
        name of what grows -> [(how much, seconds)]; no scales for a feature pyramid.
    """
    model = prepare_for_inference(load_model(cfg), dtype)
    generator = getattr(model, "pyramid", None) or model.proposal_generator

    def seconds(image_size: tuple = (480, 640), batch: int = 1) -> float:
        images = [{"image": draw_image(*image_size)}] * batch
        laps = []
        for _ in range(repeat + 1):
            started = clock(model.device)
            with autocast(model.device, dtype):
                outputs = model(images)
            for output in outputs:
                output["proposals"].proposal_masks.rle()
            laps.append(clock(model.device) - started)
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
    return curve


def plot_growth(curves: list, path: str) -> None:
    """Draw what `measure_growth` returned for several models, each with its name as `model`."""
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
    with open_output(path) as file:
        figure.savefig(file, dpi=110, format=Path(path).suffix[1:] or "png")
    pyplot.close(figure)
