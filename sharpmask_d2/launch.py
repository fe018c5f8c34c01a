"""Runs any Detectron2 script, unmodified, with this package registered.

    python -m sharpmask_d2.launch [--dataset NAME JSON IMAGE_ROOT]... SCRIPT.py ARGS...

The script, and the processes that it spawns, can use the package's models and configuration keys and the datasets of the command line.
"""

import argparse
import json
import multiprocessing.spawn
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import sharpmask_d2
import torch
from detectron2.config import defaults
from detectron2.utils.logger import setup_logger
from sharpmask_d2.data import add_dataset_option, register_datasets
from sharpmask_d2.engine import join_processes

# The environment variable that tells spawned processes what to run: {"script": path, "datasets": [...]}.
_VARIABLE = "SHARPMASK_D2_LAUNCH"


def prepare(datasets: Sequence[Sequence[str]]) -> None:
    """Adds the package's keys to what `get_cfg()` returns, registers datasets, and shows what the package logs.

    Args:
        datasets: see `data.register_datasets`.
    """
    # get_cfg copies this object, so it may have been imported before.
    sharpmask_d2.add_sharpmask_config(defaults._C)
    register_datasets(datasets)
    # Scripts set up only Detectron2's own logger.
    setup_logger(name="sharpmask_d2")


def run(script: str, arguments: Sequence[str], datasets: Sequence[Sequence[str]] = ()) -> None:
    """Runs a script as `python script arguments...` does, after `prepare`. Processes that torchrun has started are connected.

    Args:
        script: path of the Python file.
        arguments: its command line.
        datasets: see `data.register_datasets`.

    Raises:
        FileNotFoundError: the script, an annotation file or an image folder does not exist.
    """
    if not os.path.isfile(script):
        raise FileNotFoundError(f"there is no script {script}: give the path of a Python file")
    datasets = [(name, os.path.abspath(json_file), os.path.abspath(root)) for name, json_file, root in datasets]
    prepare(datasets)
    join_processes("cuda" if torch.cuda.is_available() else "cpu")
    os.environ[_VARIABLE] = json.dumps({"script": os.path.abspath(script), "datasets": datasets})
    _spawn_prepared()
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    # The folder in which `python -m` found this package, which may be the current folder.
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    runpy.run_path(script, run_name="__main__")


def _spawn_prepared() -> None:
    """Lets spawned processes import this module instead of their parent's main file; it prepares them and imports the script."""
    original = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict:
        data = original(name)
        data.pop("init_main_from_path", None)
        return {**data, "init_main_from_name": "sharpmask_d2.launch"}

    multiprocessing.spawn.get_preparation_data = get_preparation_data


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sharpmask_d2.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_dataset_option(parser)
    parser.add_argument("script", metavar="SCRIPT.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    args = parser.parse_args()
    for path in [args.script, *(path for _, *paths in args.dataset for path in paths)]:
        if not os.path.exists(path):
            parser.error(f"there is no {path}")
    run(args.script, args.arguments, args.dataset)


if __name__ == "__main__":
    _main()
elif __name__ == "__mp_main__":
    _launched = json.loads(os.environ[_VARIABLE])
    prepare(_launched["datasets"])
    # The parent pickles functions by their names in the script.
    globals().update(runpy.run_path(_launched["script"], run_name="__mp_main__"))
