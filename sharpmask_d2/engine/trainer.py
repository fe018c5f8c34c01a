"""The trainer: data loaders, optimizer, mixed precision, exact resuming and evaluation on top of Detectron2's DefaultTrainer."""

import functools
import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, defaults, hooks
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..checkpoint import SafeCheckpointer
from ..data import (
    ResumableLoader,
    build_jitter_train_loader,
    build_patch_test_loader,
    build_patch_train_loader,
    build_proposal_test_loader,
    build_proposal_train_loader,
    build_resumable_train_loader,
)
from ..data.proposal_mapper import find_test_file
from ..data.seeding import STEPS, seed_all
from ..errors import UserError
from ..evaluation import (
    GeneratedProposalEvaluator,
    PatchEvaluator,
    ProposalEvaluator,
    WithGeneratedProposals,
    evaluate_proposal_file,
)
from ..modeling.meta_arch import ALONE, ARCHITECTURE
from ..modeling.roi_heads import ProposalMaskRes5ROIHeads, ProposalMaskROIHeads
from .processes import check_joined

# Architectures that compute proposals but no detections; the last one is Detectron2's RPN without a detector.
_PROPOSAL_NETWORKS = (*ALONE, "ProposalNetwork")
# Proposal generators whose proposals can be evaluated within a detector.
_GENERATORS = ("SharpMask", "SharpMaskFPN")


def reads_proposal_masks(cfg: CfgNode) -> bool:
    """Whether the model is a detector whose detections have the masks of precomputed proposals.

    Args:
        cfg: a config; MODEL is read.
    """
    model = cfg.MODEL
    return (
        model.LOAD_PROPOSALS
        and model.META_ARCHITECTURE not in ALONE
        and issubclass(ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME), (ProposalMaskROIHeads, ProposalMaskRes5ROIHeads))
        and model.SHARPMASK.DETECTION_MASKS == "proposal"
    )


def makes_proposals(cfg: CfgNode) -> bool:
    """Whether the model is a detector with a proposal generator of this package.

    Args:
        cfg: a config; MODEL is read.
    """
    return cfg.MODEL.META_ARCHITECTURE not in ALONE and cfg.MODEL.PROPOSAL_GENERATOR.NAME in _GENERATORS


class _DepthwiseInFloat32(TorchFunctionMode):
    """A context in which autocast leaves trained depthwise convolutions in float32: on a CPU their gradients are slow in bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.conv2d or not torch.is_grad_enabled() or not _is_trained_depthwise(*args, **kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(args[0].float(), *args[1:], **kwargs)


def _is_trained_depthwise(_, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    """Whether the arguments of `conv2d` are those of a depthwise convolution whose weights have gradients."""
    return groups > 1 and weight.shape[1] == 1 and weight.requires_grad


@contextmanager
def _cpus_in_parallel() -> Iterator[None]:
    """Context in which Detectron2's trainer makes models on CPUs ready for several processes; it assumes one GPU per process."""
    original = defaults.create_ddp_model
    defaults.create_ddp_model = functools.partial(original, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = original


class _SeedStep(hooks.HookBase):
    """Seeds the random numbers of each step by its iteration and rank, so that a resumed run equals one that was not interrupted."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self):
        seed_all(self.seed, comm.get_rank(), self.trainer.iter, STEPS)


class _PatchPrinter(EventWriter):
    """Logs the quality of masks and scores of the training patches, which Detectron2's printer does not print."""

    def __init__(self):
        self.logger = logging.getLogger(__name__)

    def write(self):
        storage = get_event_storage()
        shown = [
            f"{name}: {storage.history(name).median(20):.4f}"
            for name in ("patch_iou", "score_accuracy")
            if name in storage.histories()
        ]
        if shown:
            self.logger.info(f" iter: {storage.iter}  {'  '.join(shown)}")


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer with the data loaders, optimizers, evaluation and mixed precision of this package.

    With SEED >= 0, a run that is resumed from a checkpoint equals an uninterrupted run. A run that diverges stops before it writes a
    checkpoint with numbers that are not finite.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: a config with the keys of this package.

        Raises:
            UserError: torchrun has started several processes, and they are not connected.
        """
        check_joined()
        mixed = cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.MIXED_PRECISION
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        self._cpu_autocast = mixed and on_cpu
        cfg = cfg.clone()
        cfg.defrost()
        # Detectron2's AMPTrainer requires CUDA.
        cfg.SOLVER.AMP.ENABLED = mixed and not on_cpu
        cfg.freeze()
        with _cpus_in_parallel() if on_cpu else nullcontext():
            super().__init__(cfg)

    def run_step(self) -> None:
        if not self._cpu_autocast:
            super().run_step()
            return
        # In bfloat16, losses need no scaling.
        with torch.autocast("cpu", dtype=torch.bfloat16), _DepthwiseInFloat32():
            super().run_step()

    def build_hooks(self) -> list[hooks.HookBase]:
        # Detectron2 has no method that builds the checkpointer; it is replaced here, before the hooks that use it are built.
        self.checkpointer = SafeCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        seeding = [_SeedStep(self.cfg.SEED)] if self.cfg.SEED >= 0 else []
        return seeding + super().build_hooks()

    def after_train(self) -> None:
        # Detectron2 calls it after an error, too. A process that failed in the last step would then wait for the others in the evaluation.
        if comm.get_world_size() == 1 or sys.exc_info()[0] is None:
            super().after_train()

    def build_writers(self) -> list[EventWriter]:
        return [*super().build_writers(), _PatchPrinter()]

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if isinstance(self._trainer.data_loader, ResumableLoader):
            self._trainer.data_loader.start = self.start_iter

    # Checkpoints of Detectron2 0.6 do not contain the optimizer, so that a resumed run would lose its momentum; those of later versions do.
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        # In this layout, convolutions are faster on CPUs and on CUDA; results and checkpoints do not depend on it.
        return super().build_model(cfg).to(memory_format=torch.channels_last)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        if cfg.MODEL.META_ARCHITECTURE == ARCHITECTURE:
            return build_patch_train_loader(cfg)
        if reads_proposal_masks(cfg):
            return build_proposal_train_loader(cfg)
        if cfg.INPUT.SCALE_JITTER.ENABLED:
            return build_jitter_train_loader(cfg)
        return build_resumable_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        if reads_proposal_masks(cfg):
            return build_proposal_test_loader(cfg, dataset_name)
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        if cfg.MODEL.META_ARCHITECTURE in _PROPOSAL_NETWORKS:
            return ProposalEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[list[DatasetEvaluator]] = None
    ) -> dict[str, Any]:
        """Evaluates a model on the datasets of DATASETS.TEST.

        Stand-alone networks are evaluated by the average recall of their proposals, if MODEL.SHARPMASK.TEST.FULL_IMAGES is True. The
        network that is trained on patches is also evaluated on MODEL.SHARPMASK.TEST.PATCHES_PER_IMAGE patches per image. Detectors are
        evaluated by the AP of COCO and, if they have a proposal generator of this package and FULL_IMAGES is True, by the average recall of
        its proposals.

        Args:
            cfg: a config.
            model: a model with its weights.
            evaluators: evaluators that replace those described above, as in Detectron2's `test`. Default: None.

        Returns:
            A dict of results; with several datasets, the name of each dataset -> its dict. The keys are patches, segm and bbox for a
            stand-alone network, and bbox, segm (if it has masks), proposal_bbox and proposal_segm for a detector.
        """
        if evaluators is not None:
            return super().test(cfg, model, evaluators)
        evaluate = cls._test_network if cfg.MODEL.META_ARCHITECTURE in _PROPOSAL_NETWORKS else cls._test_detector
        return _for_each_dataset(cfg, lambda name: evaluate(cfg, model, name))

    @classmethod
    def test_proposal_files(cls, cfg: CfgNode) -> dict[str, Any]:
        """Evaluates the average recall of the precomputed proposals of DATASETS.PROPOSAL_FILES_TEST.

        Args:
            cfg: a config.

        Returns:
            A dict of results with proposal_bbox and, if the file has masks, proposal_segm; with several datasets, the name of each dataset
            -> its dict.
        """
        return _for_each_dataset(
            cfg,
            lambda name: evaluate_proposal_file(name, find_test_file(cfg, name), output_dir=cfg.OUTPUT_DIR),
        )

    @classmethod
    def _test_network(cls, cfg: CfgNode, model: nn.Module, name: str) -> dict[str, Any]:
        test, results = cfg.MODEL.SHARPMASK.TEST, {}
        if test.PATCHES_PER_IMAGE and cfg.MODEL.META_ARCHITECTURE == ARCHITECTURE:
            results.update(inference_on_dataset(model, build_patch_test_loader(cfg, name), PatchEvaluator()))
        if test.FULL_IMAGES:
            loader = build_detection_test_loader(cfg, name)
            results.update(inference_on_dataset(model, loader, cls.build_evaluator(cfg, name)))
        return results

    @classmethod
    def _test_detector(cls, cfg: CfgNode, model: nn.Module, name: str) -> dict[str, Any]:
        evaluator = cls.build_evaluator(cfg, name)
        if makes_proposals(cfg) and cfg.MODEL.SHARPMASK.TEST.FULL_IMAGES:
            # Both evaluations share one pass, because the generator takes most of the time on a CPU.
            model = WithGeneratedProposals(model)
            evaluator = DatasetEvaluators([evaluator, GeneratedProposalEvaluator(name, output_dir=cfg.OUTPUT_DIR)])
        return inference_on_dataset(model, cls.build_test_loader(cfg, name), evaluator)


def _for_each_dataset(cfg: CfgNode, evaluate: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Evaluates each dataset of DATASETS.TEST and prints its results.

    Returns:
        The results of the dataset if there is one; otherwise the name of each dataset -> its results.
    """
    results = OrderedDict()
    for name in cfg.DATASETS.TEST:
        results[name] = evaluate(name)
        if comm.is_main_process():
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds SGD or AdamW, with a factor on the learning rate of the trunk or backbone.

    Args:
        cfg: a config; the keys OPTIMIZER, TRUNK_MULTIPLIER, BASE_LR, MOMENTUM, NESTEROV, BIAS_LR_FACTOR, CLIP_GRADIENTS and the three
            keys WEIGHT_DECAY of SOLVER are read.
        model: a model; the factor applies to parameters inside modules named `trunk` or `backbone`, which includes a feature pyramid.

    Raises:
        UserError: SOLVER.OPTIMIZER is neither "SGD" nor "ADAMW".
    """
    solver = cfg.SOLVER
    params = optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        trunk_multiplier=solver.TRUNK_MULTIPLIER,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.OPTIMIZER == "SGD":
        sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        return sgd(params, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    if solver.OPTIMIZER == "ADAMW":
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(params, lr=solver.BASE_LR)
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: choose 'SGD' or 'ADAMW'")


def optimizer_params(
    model: nn.Module,
    *,
    base_lr: float,
    trunk_multiplier: float = 1.0,
    bias_lr_factor: float = 1.0,
    weight_decay: float = 0.0,
    weight_decay_norm: float = 0.0,
    weight_decay_bias: Optional[float] = None,
) -> list[dict[str, Any]]:
    """Builds the parameter groups of an optimizer by Detectron2's `get_default_optimizer_params`, with a factor for the trunk.

    Args:
        model: a model whose trainable parameters are grouped. The learning rate of parameters inside modules named `trunk` or `backbone` is
            multiplied by `trunk_multiplier`.
        base_lr: learning rate.
        trunk_multiplier: factor on the learning rate of the trunk. Default: 1.
        bias_lr_factor: factor on the learning rate of biases. Default: 1.
        weight_decay: weight decay of all parameters except those of norms and biases. Default: 0.
        weight_decay_norm: weight decay of the parameters of norms. Default: 0.
        weight_decay_bias: weight decay of biases. Default: None, the weight decay of the layer that the bias belongs to.

    Returns:
        Groups, dicts with params, lr and weight_decay.
    """
    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
    )
    if trunk_multiplier == 1:
        return groups
    trunk = {
        parameter
        for name, parameter in model.named_parameters()
        if not {"trunk", "backbone"}.isdisjoint(name.split("."))
    }
    split = [
        {**group, "lr": group["lr"] * factor, "params": [p for p in group["params"] if (p in trunk) == in_trunk]}
        for in_trunk, factor in ((True, trunk_multiplier), (False, 1.0))
        for group in groups
    ]
    return [group for group in split if group["params"]]
