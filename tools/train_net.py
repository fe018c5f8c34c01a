#!/usr/bin/env python
"""Train or evaluate DeepMask, SharpMask, and detectors on their proposals, in Detectron2's manner.

    tools/train_net.py --config-file configs/deepmask_lite0.yaml --dataset my_train train.json images \
        DATASETS.TRAIN "('my_train',)"

--eval-only prints what fits the model: per-patch figures and the average recall (AR) of proposals for DeepMask and SharpMask; AP for
detectors, of boxes and of masks where they have some, and the AR of the proposals they make or read.
"""

import argparse

import sharpmask_d2
import torch
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from sharpmask_d2.checkpoint import StrictCheckpointer
from sharpmask_d2.data import add_dataset_option, register_datasets
from sharpmask_d2.engine import Trainer


def parse_args() -> argparse.Namespace:
    parser = default_argument_parser(epilog=__doc__)
    add_dataset_option(parser)
    return parser.parse_args()


def evaluate(cfg, *, resume: bool) -> dict:
    """Print and return the figures of MODEL.WEIGHTS, or with `resume` of the last checkpoint in OUTPUT_DIR.

    Raises:
        ValueError: neither is there, or the weights are of another model.
    """
    model = Trainer.build_model(cfg)
    # A checkpoint of another model would give figures that mean nothing.
    checkpointer = StrictCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        raise ValueError(
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


def main(args: argparse.Namespace):
    register_datasets(args.dataset)
    cfg = get_cfg()
    sharpmask_d2.add_sharpmask_config(cfg)
    # Tags in a yaml file that run code are refused.
    cfg.merge_from_file(args.config_file, allow_unsafe=False)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="sharpmask_d2")
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
