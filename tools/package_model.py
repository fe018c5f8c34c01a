#!/usr/bin/env python
"""`sharpmask package-model`, as a script."""

from sharpmask_d2.cli.command import run
from sharpmask_d2.cli.package_model import main

if __name__ == "__main__":
    run(main)
