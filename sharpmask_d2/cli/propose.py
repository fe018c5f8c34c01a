"""Computes segment proposals of images and writes them as COCO result JSON.

    sharpmask propose --input photographs/ --output proposals.json --visualize pictures/
    sharpmask propose --annotations instances.json --image-root images/ --output proposals.json
    sharpmask propose --model-folder exported/ --input photographs/ --output proposals.json

The third line runs a model that `sharpmask export-model` has written, without torch and without Detectron2.

Images given by --input are numbered from 1 in the order of their names, and every result also has the file_name. Folders are searched
with their sub-folders; hidden files are skipped. An image that cannot be processed is named and left out, and the exit status is 1.
A run that was stopped resumes when it is started again with the same settings; images that were added, replaced or removed in the
meantime affect no other image.

Several processes or machines share a run with --shard, or with torchrun:

    torchrun --nproc_per_node 2 -m sharpmask_command propose --input photographs/ --output proposals.json

Each process of torchrun works on a part of the images, on a GPU of its own where there are several, and the last one writes the output.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..extras import check_detectron2
from ..model_zoo import DEFAULT
from .command import (
    add_console_options,
    add_dtype_option,
    add_model_options,
    add_pkl_options,
    add_shard_option,
    add_threads_option,
    console_of,
    make_parser,
    positive,
    set_threads,
)

# Attribute of the arguments -> option that an exported model does not have.
_TRAINED_ONLY = {
    "model": "--model",
    "config_file": "--config-file",
    "weights": "--weights",
    "dtype": "--dtype",
    "compiled": "--compile",
    "opts": "KEY VALUE",
}


def _parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = make_parser("propose", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE_OR_DIR", help="images, or folders of images")
    source.add_argument("--annotations", metavar="JSON", help="COCO annotation file that lists the images")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images that --annotations lists")
    parser.add_argument("--output", required=True, metavar="JSON", help="COCO result file to write")
    parser.add_argument(
        "--num-proposals",
        type=positive,
        metavar="N",
        help="maximum number of proposals per image; default: as in the config",
    )
    parser.add_argument("--visualize", metavar="DIR", help="folder for pictures of the best proposals")
    add_pkl_options(parser)
    add_dtype_option(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        dest="compiled",
        help="compile the trunk; worthwhile for many images of one size, on some processors",
    )
    add_threads_option(parser)
    add_shard_option(parser)
    add_console_options(parser)
    add_model_options(parser, default=DEFAULT)
    parser.add_argument("--model-folder", metavar="DIR", help="exported model, instead of a packaged model")
    args = parser.parse_intermixed_args(argv)
    if args.annotations and not args.image_root:
        parser.error("--annotations needs --image-root")
    if args.model_folder:
        for name, option in _TRAINED_ONLY.items():
            if getattr(args, name) not in (parser.get_default(name), []):
                parser.error(f"{option} cannot be combined with --model-folder: the exported model has its own")
    if args.shard and args.pkl:
        parser.error("--pkl cannot be combined with --shard: give it to `sharpmask merge`")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs `sharpmask propose`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.

    Returns:
        Exit status: 1 if an image failed, else 0.
    """
    args = vars(_parse_args(argv))
    if args["model_folder"]:
        from ..runtime.propose import compute_proposals as compute_exported

        exported = {name: value for name, value in args.items() if name not in _TRAINED_ONLY}
        with console_of(exported):
            return compute_exported(**exported)
    check_detectron2()
    from ..inference.propose import compute_proposals

    del args["model_folder"]
    set_threads(args.pop("threads"))
    with console_of(args):
        return compute_proposals(**args)
