"""Where things are."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
REALSR = Path(os.environ.get("ICMSR_REALSR") or ROOT.parent / "shared/data/realsr")
"""RealSR's pairs, where they are at hand."""
