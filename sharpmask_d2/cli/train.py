r"""Trains or evaluates a model, with the options of Detectron2's train_net.py.

    sharpmask train --config-file configs/deepmask_lite0.yaml --dataset my_train train.json images \
        DATASETS.TRAIN "('my_train',)"
    sharpmask train --config-file configs/deepmask_lite0.yaml --dataset my_val val.json images --eval-only \
        DATASETS.TEST "('my_val',)" MODEL.WEIGHTS model_final.pth

    torchrun --nproc_per_node 2 --no-python sharpmask train ...  # two processes, on GPUs or on CPUs

The config is a yaml file. `python -m sharpmask_d2.launch` runs Detectron2's lazyconfig_train_net.py, which trains LazyConfig files.

--eval-only prints the metrics of the model: for DeepMask and SharpMask metrics per patch and the average recall (AR) of the proposals; for
detectors the AP of boxes, the AP of masks where the detector has masks, and the AR of the proposals that it makes or reads.
"""

import argparse
from collections.abc import Sequence
from typing import Any, Optional

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import StrictCheckpointer
from ..config import check_device, merge_options, read_config
from ..data import add_dataset_option, check_datasets, register_datasets
from ..engine.processes import run_processes
from ..engine.trainer import Trainer
from ..errors import UserError


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = default_argument_parser(epilog=examples)
    parser.prog, parser.description = "sharpmask train", summary
    add_dataset_option(parser)
    return parser.parse_args(argv)


def evaluate(cfg: CfgNode, *, resume: bool) -> dict[str, Any]:
    """Evaluates a model on DATASETS.TEST and prints its metrics.

    Args:
        cfg: of the model; MODEL.WEIGHTS is evaluated.
        resume: evaluates the last checkpoint in OUTPUT_DIR instead, where there is one.

    Returns:
        The metrics, by dataset if there are several.

    Raises:
        UserError: there are no weights, or they belong to another model.
    """
    model = Trainer.build_model(cfg)
    # The metrics of a checkpoint that does not fit would be meaningless.
    checkpointer = StrictCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise UserError(
            "--eval-only: there are no weights to evaluate; give a checkpoint, MODEL.WEIGHTS model_final.pth"
        )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if not cfg.MODEL.LOAD_PROPOSALS:
        return results
    recall = Trainer.test_proposal_files(cfg)
    if len(cfg.DATASETS.TEST) == 1:
        return {**results, **recall}
    return {name: {**results[name], **recall[name]} for name in results}


def build_config(args: argparse.Namespace) -> CfgNode:
    """Builds the config that a command line asks for.

    Args:
        args: with `config_file` and `opts`.

    Raises:
        UserError: there is no such file, key or device, or a value has the wrong type; the message names it.
    """
    if not args.config_file:
        raise UserError("--config-file is missing: configs/ has one for each model")
    cfg = read_config(args.config_file)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    merge_options(cfg, args.opts)
    check_device(cfg)
    cfg.freeze()
    return cfg


def train_or_evaluate(args: argparse.Namespace, cfg: CfgNode) -> Any:
    """Trains or evaluates in one of the processes of `run_processes`."""
    register_datasets(args.dataset)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="sharpmask_d2")
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask train`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status, 0.
    """
    args = _parse_args(argv)
    # Mistakes are found before other processes are started, whose errors come with tracebacks.
    cfg = build_config(args)
    register_datasets(args.dataset)
    if not args.eval_only:
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    if args.eval_only or cfg.DATASETS.TEST:
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        raise UserError(f"--num-gpus is {args.num_gpus}, but torch finds {gpus}")
    run_processes(
        train_or_evaluate,
        (args, cfg),
        device=cfg.MODEL.DEVICE,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
    )
    return 0
