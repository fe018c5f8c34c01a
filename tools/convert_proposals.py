#!/usr/bin/env python
"""`sharpmask convert-proposals`, as a script."""

from sharpmask_d2.cli.command import run
from sharpmask_d2.cli.convert_proposals import main

if __name__ == "__main__":
    run(main)
