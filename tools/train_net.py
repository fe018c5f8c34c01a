#!/usr/bin/env python
"""Train or evaluate DeepMask, SharpMask, and detectors on their proposals, in Detectron2's manner.

    tools/train_net.py --config-file configs/deepmask_lite0.yaml --dataset my_train train.json images \
        DATASETS.TRAIN "('my_train',)"

--eval-only prints what fits the model: per-patch figures and the average recall (AR) of proposals for DeepMask and SharpMask; AP for
detectors, of boxes and of masks where they have some, and the AR of the proposals they make or read.
"""

import argparse

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from sharpmask_d2.checkpoint import StrictCheckpointer
from sharpmask_d2.cli.command import run
from sharpmask_d2.config import check_device, merge_options, read_config
from sharpmask_d2.data import add_dataset_option, check_datasets, register_datasets
from sharpmask_d2.engine.trainer import Trainer
from sharpmask_d2.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = default_argument_parser(epilog=__doc__)
    add_dataset_option(parser)
    return parser.parse_args()


def evaluate(cfg, *, resume: bool) -> dict:
    """Print and return the figures of MODEL.WEIGHTS, or with `resume` of the last checkpoint in OUTPUT_DIR.

    Raises:
        UserError: neither is there, or the weights are of another model.
    """
    model = Trainer.build_model(cfg)
    # A checkpoint of another model would give figures that mean nothing.
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
    if not args.config_file:
        raise UserError("--config-file is missing: configs/ has one for each model")
    cfg = read_config(args.config_file)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    merge_options(cfg, args.opts)
    check_device(cfg)
    cfg.freeze()
    return cfg


def train_or_evaluate(args: argparse.Namespace, cfg: CfgNode):
    """What each process does."""
    register_datasets(args.dataset)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="sharpmask_d2")
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main() -> None:
    args = parse_args()
    # Before there are other processes, whose errors come with tracebacks.
    cfg = build_config(args)
    register_datasets(args.dataset)
    if not args.eval_only:
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    if args.eval_only or cfg.DATASETS.TEST:
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        raise UserError(f"--num-gpus is {args.num_gpus}, but torch finds {gpus}")
    launch(
        train_or_evaluate,
        args.num_gpus,
        args.num_machines,
        args.machine_rank,
        args.dist_url,
        args=(args, cfg),
    )


if __name__ == "__main__":
    run(main)
