#!/usr/bin/env python
"""`sharpmask train`, as a script."""

from sharpmask_d2.cli.command import run
from sharpmask_d2.cli.train import main

if __name__ == "__main__":
    run(main)
