#!/usr/bin/env python3
"""Shows what a checkpoint of any kind holds, and verifies it; see --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from anywhere, installed or not

from mindgen.commands.show import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
