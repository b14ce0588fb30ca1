"""The training scripts where processes start as under Windows and macOS: from nothing, with everything pickled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.loader import Resumable, make_loader
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.weights.generator_file import load_generator
from tests.support.places import ROOT

pytestmark = pytest.mark.long

RUN_ALL = """
import json, multiprocessing, runpy, sys
from tests.support.script_process import shorten_checkpoints
multiprocessing.set_start_method("spawn")
shorten_checkpoints()
for script, *flags in json.loads(sys.stdin.read()):
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{script} ended with {end.code}")
"""
"""One process for all scripts, as the imports of each take ten seconds; their data workers and jobs are new ones."""
STARTING_NONE = {"metric_weights.py", "pack_photographs.py", "teacher_view.py"}
"""Scripts that start no process."""


def loop_flags(name: str) -> list[str]:
    values = {"images": 4, "batch": 2, "precision": "fp32", "workers": 1, "warmup_images": 0, "tensorboard": False}
    return [f"--{name}.{key}={value}" for key, value in {**values, "log_every": 100}.items()]


def commands(photographs: Path) -> dict[str, list[str]]:
    """The toy run of each script that starts processes; each goes on from the one before."""
    data = ["--data.synthetic=1", "--data.crop=32", "--data.folders=[]"]
    networks = ["latent_channels=4", "vae_channels=[32,32,32,32]", "unet_channels=[32,64]"]
    base = ["--base", "prior/autoencoder/base"]
    sizes = {"crops": 4, "held_out_crops": 2, "batch": 2, "seeds": "[0,1]", "conditions": "['none']"}
    steps = dict.fromkeys(("prior_steps", "generator_steps", "adapter_steps", "auxiliary_steps", "joint_steps"), 1)
    return {
        "prior.py": [
            *("--run", "prior", "--autoencoder_only=true", *data, *loop_flags("autoencoder")),
            *(f"--networks.{value}" for value in networks),
        ],
        "adapter.py": ["--run", "adapter", *base, *data, *loop_flags("loop")],
        "distill.py": [
            *("--run", "generator", *base, *data, *loop_flags("loop"), "--condition.adapters=['adapter/adapter']"),
            *("--generator.timestep=200", "--generator.prediction=residual"),
        ],
        "collapse.py": [
            *("--config", str(ROOT / "train" / "configs" / "collapse.yaml"), "--run", "collapse", "--jobs=2"),
            *("--data.hold_out=0.3", f"--data.folders=['{photographs}']"),
            *(f"--collapse.{key}={value}" for key, value in {**sizes, **steps}.items()),
        ],
    }


def run_in(folder: Path, runs: dict[str, list[str]]) -> None:
    """Runs scripts, one after another, in the new `folder`."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([[str(ROOT / "train" / script), *flags] for script, flags in runs.items()]).encode(),
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")[-4000:]
    assert load_generator(folder / "generator" / "generator.safetensors").info.timestep == 200


@pytest.mark.slow
def test_distillation_starts_its_processes_from_nothing(tmp_path):
    """In a folder with space, umlaut and a name that cp1252 lacks."""
    flags = ["--run", "generator", "--data.synthetic=1", "--data.crop=32", "--data.folders=[]", *loop_flags("loop")]
    flags += ["--condition.kind=none", "--generator.timestep=200", "--generator.prediction=residual"]
    run_in(
        tmp_path / "Läufe 图",
        {"distill.py": [*flags, "--generator.networks.weights=whole", "--generator.losses.icm=0"]},
    )


@pytest.mark.slow
def test_every_script_starts_its_processes_from_nothing(tmp_path):
    """The ablation is left out: its jobs are of the same kind as those of the collapse."""
    folder, photographs = tmp_path / "Läufe 图", tmp_path / "photos"
    photographs.mkdir()
    for number in range(8):
        picture = np.random.default_rng(number).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(picture).save(photographs / f"{number}.png")
    runs = commands(photographs)
    assert {path.name for path in (ROOT / "train").glob("*.py")} - STARTING_NONE - {"ablation.py"} == set(runs)
    run_in(folder, runs)
    assert (folder / "collapse" / "report" / "collapse.md").is_file()


def test_a_spawned_worker_makes_the_same_samples():
    pairs = TrainingPairs(DataConfig(synthetic=1.0, crop=64), seed=1)
    numbers = Resumable(0, 8, 2)
    spawned = make_loader(pairs, numbers, 1)
    spawned.multiprocessing_context = "spawn"
    for here, there in zip(make_loader(pairs, numbers, 0), spawned, strict=True):
        assert here.keys() == there.keys()
        assert all(here[name].equal(there[name]) for name in here)
