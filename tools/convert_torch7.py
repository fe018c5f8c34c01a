#!/usr/bin/env python
"""`sharpmask convert-model`, as a script."""

from sharpmask_d2.cli.command import run
from sharpmask_d2.cli.convert_model import main

if __name__ == "__main__":
    run(main)
