"""Opens a page in the browser that shows the masks of photographs.

    sharpmask app
    sharpmask app --input photographs/ --port 8000

The page needs Gradio: pip install "sharpmask_d2[app]". It listens on this machine only, keeps photographs in memory only, and asks no other
server for anything. --input offers images to choose from; the page shows them to everyone who can open it.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

from ..app.server import serve
from .command import add_threads_option, make_parser, positive, set_threads


def _port(text: str) -> int:
    """Reads the number of a port, 0 for a free one."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not in 0..65535")
    return value


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs `sharpmask app`.

    Args:
        argv: arguments behind the subcommand; None reads them from the command line.
    """
    parser = make_parser("app", __doc__)
    parser.add_argument(
        "--input", nargs="+", metavar="FILE_OR_DIR", help="images, or folders of images, to choose from"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on; default: %(default)s"
    )
    parser.add_argument(
        "--port", default=7860, type=_port, help="port to listen on, 0 for a free one; default: %(default)s"
    )
    parser.add_argument(
        "--max-megabytes", default=20, type=positive, metavar="N", help="maximum size of a file; default: %(default)s"
    )
    parser.add_argument(
        "--max-megapixels",
        default=16,
        type=positive,
        metavar="N",
        help="maximum number of pixels of an image in millions; default: %(default)s",
    )
    parser.add_argument("--model", metavar="NAME", help="packaged model that is chosen at first")
    add_threads_option(parser)
    args = vars(parser.parse_args(argv))
    set_threads(args.pop("threads"))
    serve(**args)
