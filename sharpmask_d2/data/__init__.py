"""Reads annotations, images and precomputed proposals, and makes the batches of training and evaluation."""

from typing import TYPE_CHECKING

from ..lazy import load_when_asked

if TYPE_CHECKING:
    from .datasets import add_dataset_option, check_datasets, register_datasets
    from .loader import build_patch_test_loader, build_patch_train_loader
    from .patch_mapper import PatchMapper
    from .proposal_mapper import (
        ProposalMapper,
        build_proposal_test_loader,
        build_proposal_train_loader,
        load_proposal_masks,
    )
    from .resumable import ResumableLoader, build_resumable_train_loader
    from .scale_jitter import build_jitter_train_loader
    from .window_sampling import WindowSampler

__all__ = [
    "PatchMapper",
    "ProposalMapper",
    "ResumableLoader",
    "WindowSampler",
    "add_dataset_option",
    "build_jitter_train_loader",
    "build_patch_test_loader",
    "build_patch_train_loader",
    "build_proposal_test_loader",
    "build_proposal_train_loader",
    "build_resumable_train_loader",
    "check_datasets",
    "load_proposal_masks",
    "register_datasets",
]

# The names of `__all__`. Modules that need neither torch nor Detectron2 are imported without the others.
__getattr__ = load_when_asked(
    __name__,
    {
        "datasets": ["add_dataset_option", "check_datasets", "register_datasets"],
        "loader": ["build_patch_test_loader", "build_patch_train_loader"],
        "patch_mapper": ["PatchMapper"],
        "proposal_mapper": [
            "ProposalMapper",
            "build_proposal_test_loader",
            "build_proposal_train_loader",
            "load_proposal_masks",
        ],
        "resumable": ["ResumableLoader", "build_resumable_train_loader"],
        "scale_jitter": ["build_jitter_train_loader"],
        "window_sampling": ["WindowSampler"],
    },
)
