"""How a run of the whole suite, or of a folder, is shared out between two processes (pytest-xdist).

A file's tests stay together, because its fixtures are built once in each process that needs them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

WORKERS = 2
"""More would share the memory of one machine: a process with everything loaded takes up to 4 GB, ComfyUI another 3."""

SHARED_SERVER = (
    "tests/nodes/test_comfy_server.py",
    "tests/nodes/test_comfy_frontend.py",
    "tests/nodes/test_comfy_checkpoints.py",
)
"""Files that use one running ComfyUI: together they start it once."""

LONGEST_FIRST = (
    "tests/train/run/test_training.py",
    "tests/nodes/test_comfy_server.py",
    "tests/train/run/test_distributed.py",
    "tests/devices/test_training.py",
    "tests/train/run/test_spawn.py",
    "tests/devices/test_budgets.py",
    "tests/nodes/test_comfy_devices.py",
    "tests/devices/test_upscale.py",
    "tests/nodes/test_comfy_float16.py",
    "tests/nodes/test_comfy_memory.py",
    "tests/nodes/test_comfy_archive.py",
    "tests/release/test_artwork.py",
    "tests/release/test_publish.py",
    "tests/train/experiments/test_ablation.py",
    "tests/train/tasks/test_nano_training.py",
    "tests/benchmarks/test_benchmarks.py",
    "tests/cli/test_cli.py",
    "tests/runtime/test_precision.py",
    "tests/nodes/test_comfy_native.py",
    "tests/exchange/test_exporters.py",
    "tests/cli/test_picture_jobs.py",
    "tests/nodes/test_comfy_adapters.py",
    "tests/weights/test_single_file.py",
    "tests/train/experiments/test_collapse.py",
    "tests/train/tasks/test_training_tasks.py",
    "tests/train/networks/test_roles.py",
)
"""Groups that take over ten seconds, the longest first; all others follow. Else one process would end alone."""


def file_of(nodeid: str) -> str:
    """The test file that `nodeid` is in."""
    return nodeid.split("::")[0]


def group_of(nodeid: str) -> str:
    """Name of the group of tests that run in one process."""
    name = file_of(nodeid)
    return SHARED_SERVER[0] if name in SHARED_SERVER else name


def rank_of(nodeid: str) -> int:
    """Position of a test's group in `LONGEST_FIRST`."""
    group = group_of(nodeid)
    return LONGEST_FIRST.index(group) if group in LONGEST_FIRST else len(LONGEST_FIRST)


def worth_sharing(arguments: Sequence[str]) -> bool:
    """Whether the command line names folders: a second process costs more than it saves for a file or a single test."""
    return any(Path(argument).is_dir() for argument in arguments)


def share_out(config: pytest.Config) -> None:
    """Sets pytest-xdist's options as `-n 2` would, unless the command line says something else."""
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return  # a process among several runs this too, and would start two of its own
    option = config.option
    chosen = option.numprocesses is not None or option.dist != "no" or option.tx
    one_by_one = option.usepdb or option.collectonly or option.capture == "no"
    if not chosen and not one_by_one and (os.cpu_count() or 1) > 1 and worth_sharing(config.args):
        option.numprocesses = WORKERS


def scheduler(config: pytest.Config, log):
    """Gives each group of tests to the next process that is free, in the order in which they were collected."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return FilesTogether(config, log)
