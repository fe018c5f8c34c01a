#!/usr/bin/env python
"""`sharpmask analyze`, as a script."""

from sharpmask_d2.cli.analyze import main
from sharpmask_d2.cli.command import run

if __name__ == "__main__":
    run(main)
