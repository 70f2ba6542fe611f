#!/usr/bin/env python3
"""Converts checkpoints between Hugging Face folders and Megatron directories of any TP x PP; see --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from anywhere, installed or not

from mindgen.commands.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
