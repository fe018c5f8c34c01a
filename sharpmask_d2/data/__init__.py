from .datasets import add_dataset_option, register_datasets
from .loader import build_patch_test_loader, build_patch_train_loader
from .patch_mapper import PatchMapper
from .window_sampling import WindowSampler

__all__ = [
    "PatchMapper",
    "WindowSampler",
    "add_dataset_option",
    "build_patch_test_loader",
    "build_patch_train_loader",
    "register_datasets",
]
