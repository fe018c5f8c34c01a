#!/usr/bin/env python
"""`sharpmask propose`, as a script."""

import os

# Read when torch is loaded; see docs/performance.md, "Shared machines".
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from sharpmask_d2.cli.command import run
from sharpmask_d2.cli.propose import main

if __name__ == "__main__":
    run(main)
