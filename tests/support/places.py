"""Where things are."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
REALSR = Path(os.environ.get("ICMSR_REALSR") or ROOT.parent / "shared/data/realsr")
"""RealSR's pairs, where they are at hand."""
METRIC_WEIGHTS = Path(os.environ.get("ICMSR_METRIC_WEIGHTS") or ROOT / "metric-weights")
"""What train/metric_weights.py makes of the published weights, where that is at hand."""
