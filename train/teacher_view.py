"""Measures how near the truth the teacher's clean estimate is, by noise level, with a condition and without.

The pictures must be ones that the training of base and adapters did not see, such as the HR folder of RealSR.

    python train/teacher_view.py --config train/configs/teacher_view.yaml --pictures=RealSR/HR
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from icmsr_core.cli.job_list import check_writable
from icmsr_core.runtime.device import pick_device
from icmsr_core.steps import Steps
from icmsr_core.train.experiments.teacher_view import (
    ViewConfig,
    check_view,
    load_arms,
    measure_view,
    open_teacher,
    read_crops,
)
from icmsr_core.train.experiments.teacher_view_report import markdown, write_view
from icmsr_core.train.run.launch import parse_config, run_script
from icmsr_core.train.settings import plain_settings
from icmsr_core.train.tasks.building import training_base


@dataclass(frozen=True)
class Config(ViewConfig):
    """The teacher's view: OUT/teacher_view.json and .md, OUT/error_by_noise.png, OUT/grid.png."""

    out: str = "runs/teacher_view"
    """Folder for the results."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def main() -> None:
    """Everything that can be wrong in the configuration is found before a weight is read."""
    config = parse_config(Config)
    device, base, out = pick_device(config.device), training_base(config.base), Path(config.out)
    check_view(config, base)
    names, crops = read_crops(config)
    check_writable(out)
    logging.info("base %s, %d pictures, %s", base.info.name, len(names), device)
    teacher, arms = open_teacher(base, device), load_arms(config, base, device)
    view = measure_view(
        teacher,
        arms,
        names,
        crops,
        config,
        device,
        Steps(lambda done, count: logging.info("picture %d of %d done", done, count)),
    )
    written = write_view(view, plain_settings(config), out)
    print(markdown(view))
    for path in written:
        logging.info("wrote %s", path)


if __name__ == "__main__":
    sys.exit(run_script(main))
