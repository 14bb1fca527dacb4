"""Runs a script with arguments, as python does, with the grids of one more folder:
python tests/with_grids.py FOLDER SCRIPT ARGUMENTS
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
import grids

if __name__ == "__main__":
    grids.__path__.append(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
