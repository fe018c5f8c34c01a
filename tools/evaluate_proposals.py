#!/usr/bin/env python
"""`sharpmask evaluate`, as a script."""

from sharpmask_d2.cli.command import run
from sharpmask_d2.cli.evaluate import main

if __name__ == "__main__":
    run(main)
