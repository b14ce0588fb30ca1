"""The training scripts, run for real at toy size: the chain, kills and resumes, wrong configurations."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from icmsr_core.cli.main import main
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.networks.adapters import make_adapter, save_adapter
from icmsr_core.train.run.launch import parse_config, run_script
from icmsr_core.train.run.logs import read_metrics
from icmsr_core.train.tasks.adapter import AdapterConfig
from icmsr_core.train.tasks.building import Loading, build_adapter_task, training_base
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import load_generator
from tests.support.model_files import TINY
from tests.support.places import ROOT
from tests.support.script_process import ScriptProcess, load_script, start_server

DATA = ["--data.synthetic=1", "--data.crop=32", "--data.folders=[]"]
TINY_FLAGS = [
    "--networks.latent_channels=4",
    "--networks.vae_channels=[32,32,32,32]",
    "--networks.unet_channels=[32,64]",
]


def loop_flags(name: str, images: int, **more: object) -> list[str]:
    values = {
        "images": images,
        "batch": 2,
        "precision": "fp32",
        "workers": 0,
        "warmup_images": 4,
        "save_every": 4,
        "log_every": 2,
        **more,
    }
    return [f"--{name}.{key}={value}" for key, value in values.items()]


def run(name: str, *arguments: object, folder: Path, code: int = 0) -> str:
    process = ScriptProcess(name, *arguments, folder=folder)
    assert process.wait() == code, process.output()
    return process.output()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(3)
    return save_adapter(path, make_adapter(4, 8, TINY.unet_channels), {}, torch.float32)[0]


def distill(
    base: Path, folder: Path | str, images: int = 12, adapter: Path | None = None, **more: object
) -> list[object]:
    """Arguments of train/distill.py: the whole method with `adapter`, reconstruction alone without."""
    condition = ["--generator.losses.icm=0"] if adapter is None else [f"--condition.adapters=['{adapter}']"]
    return [
        "--run",
        folder,
        "--base",
        base,
        "--generator.timestep=200",
        "--generator.prediction=residual",
        *condition,
        *DATA,
        *loop_flags("loop", images, **more),
    ]


@pytest.mark.slow
def test_prior_then_distill_then_upscale(tmp_path):
    start_server()
    # The one run with a Python of its own, from another folder, as a user types it.
    prior = [
        sys.executable,
        ROOT / "train" / "prior.py",
        "--run",
        tmp_path / "prior",
        *DATA,
        *TINY_FLAGS,
        *loop_flags("autoencoder", 8, save_every=8),
        *loop_flags("prior", 8, save_every=8),
    ]
    done = subprocess.run(list(map(str, prior)), capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "prior").glob("*/plots/*.png"))
    base = tmp_path / "prior" / "prior" / "base"
    latents = load_backbone(Recipe(base)).encode(torch.rand(8, 3, 32, 32) * 2 - 1)
    assert latents.shape == (8, 4, 4, 4)
    flags = ["--run", tmp_path / "adapter", "--base", base, *DATA, *loop_flags("loop", 8, save_every=8)]
    run("adapter.py", *flags, folder=tmp_path)
    adapter = tmp_path / "adapter" / "adapter"
    run("distill.py", *distill(base, tmp_path / "run", 8, adapter=adapter, save_every=8), folder=tmp_path)
    generator = load_generator(tmp_path / "run" / "generator.safetensors")
    assert generator.info.base_hash == open_base(base).hash()
    assert generator.info.training["loop"]["images"] == 8
    backbone = load_backbone(Recipe(base, tmp_path / "run" / "generator.safetensors"))
    result = upscale(backbone, torch.rand(1, 3, 9, 14), UpscaleSettings())
    assert result.shape == (1, 3, 36, 56)
    assert bool(result.isfinite().all())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [2, 4, 6, 8, 8]  # the last is what a checkpoint measures
    wanted = {"loss/generator/loss", "loss/auxiliary/loss", "loss/generator/icm", "health/gradient/generator"}
    assert all(wanted <= set(line) for line in lines[:-1])
    assert any(key.startswith("icm/rho/") for line in lines for key in line)
    # Input, result, truth, colormap and edges of six samples.
    assert Image.open(tmp_path / "run" / "grids" / "000000008.png").size == (6 * 32, 5 * 32)


@pytest.mark.long
def test_what_the_toy_configurations_train_upscales_a_picture(toy_run, tmp_path):
    """Through the command line; `test_comfy_server.py` does it through the node."""
    generator = toy_run / "toy_distill" / "generator.safetensors"
    picture = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(picture)
    for name, model in (("toy.png", generator), ("nano.png", "nano")):
        assert main(["upscale", str(picture), str(tmp_path / name), "--model", str(model), "--device", "cpu"]) == 0
    toy, nano = (np.asarray(Image.open(tmp_path / name), dtype=int) for name in ("toy.png", "nano.png"))
    assert toy.shape == (80, 120, 3)
    assert np.abs(toy - nano).max() > 2
    rows = read_metrics(toy_run / "toy_distill" / "metrics.jsonl")
    assert [row["images"] for row in rows[-2:]] == [64, 64]
    assert rows[-2]["loss/generator/psnr"] > 12
    assert rows[-1]["latent/error/0"] < 1.1
    pairs = TrainingPairs(DataConfig(synthetic=1, crop=64), 5)
    samples = [pairs[number] for number in range(16)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    torch.manual_seed(0)
    task = build_adapter_task(training_base(""), AdapterConfig(), 0, Loading())
    given = task.prepare("weights", batch, 0, 0)
    blind = {**given, "keep": torch.zeros(16, dtype=torch.bool)}
    with torch.no_grad():
        untrained, without = (task("weights", some)[0]["loss"] for some in (given, blind))
        task.adapter.load_state_dict(load_file(toy_run / "toy_adapter" / "adapter.safetensors"))
        trained = task("weights", given)[0]["loss"]
    assert trained < without, "the teacher sees better with the condition, on samples that were not trained on"
    assert trained < untrained
    assert main(["inspect", str(toy_run / "toy_adapter" / "adapter.safetensors")]) == 0


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def checkpoint(run: Path, images: int) -> Path:
    return run / "checkpoints" / f"{images:09d}" / "state.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base, adapter) -> Path:
    """The run folder of a distillation, ICM included, that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("distill.py", *distill(base, "run", adapter=adapter), folder=folder)
    return folder / "run"


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights bit for bit, generator and auxiliary, and a log that reads as if nothing had happened."""
    assert_same_tensors(one / "generator.safetensors", other / "generator.safetensors")
    assert_same_tensors(checkpoint(one, 12), checkpoint(other, 12))
    assert read_metrics(one / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")


@pytest.mark.long
@pytest.mark.parametrize(
    ("kill", "workers"),
    [
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, base, adapter, uninterrupted, kill, workers):
    arguments = distill(base, "run", adapter=adapter, workers=workers)
    process = ScriptProcess("distill.py", *arguments, folder=tmp_path)
    process.wait_for(checkpoint(tmp_path / "run", 4))
    os.kill(process.pid, kill)
    assert process.wait() == (-kill if kill == signal.SIGKILL else 130), process.output()
    assert not (tmp_path / "run" / "generator.safetensors").exists()
    run("distill.py", *arguments, folder=tmp_path)
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells files by /proc")
@pytest.mark.parametrize("flush", [1, *(pytest.param(flush, marks=pytest.mark.slow) for flush in (2, 6))])
def test_a_run_killed_while_it_writes_a_checkpoint_ends_like_one_that_was_not(
    tmp_path, base, adapter, uninterrupted, flush
):
    """Killed for good in the middle of the first checkpoint's generator file or state, and of later ones'."""
    arguments = distill(base, "run", adapter=adapter)
    process = ScriptProcess("distill.py", *arguments, folder=tmp_path, stall=(flush, tmp_path / "writing"))
    process.wait_for(tmp_path / "writing")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    images = 4 * ((flush + 1) // 2)
    partial = tmp_path / "run" / "checkpoints" / f"{images:09d}.partial"
    assert partial.is_dir()
    assert not checkpoint(tmp_path / "run", images).exists()
    run("distill.py", *arguments, folder=tmp_path)
    assert not partial.exists()
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.long
def test_checkpoints_are_pruned_and_hold_a_generator(uninterrupted, base):
    kept = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert kept == ["000000008", "000000012"]
    last = uninterrupted / "checkpoints" / "000000012" / "generator.safetensors"
    assert_same_tensors(last, uninterrupted / "generator.safetensors")
    assert load_backbone(Recipe(base, last)).descriptor.timestep == 200


@pytest.mark.long
@pytest.mark.parametrize(
    ("kill", "groups"),
    [
        (signal.SIGTERM, True),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_group_saves_the_state_too(tmp_path, base, kill, groups):
    """As `timeout`, a scheduler or Ctrl-C sends it: the data workers get it as well and must outlive the loop.

    Without groups as under Windows, where Ctrl-C is the only one of them.
    """
    process = ScriptProcess("distill.py", *distill(base, "run", 4000, workers=2), folder=tmp_path, groups=groups)
    process.wait_for(checkpoint(tmp_path / "run", 4))
    os.killpg(process.pid, kill)
    assert process.wait() == 130, process.output()
    assert "the same command goes on from here" in process.output()
    assert "Traceback" not in process.output()
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert f"stopped at {int(newest.name)} images" in process.output()


@pytest.mark.long
@pytest.mark.slow
def test_a_prior_stopped_in_both_halves_ends_like_one_that_was_not(tmp_path):
    # A log without lines, because the plots of one take longer than the training; so many images, to stop in time.
    loops = (flag for half in ("autoencoder", "prior") for flag in loop_flags(half, 48, log_every=100))
    arguments = ["--run", "run", *DATA, *TINY_FLAGS, *loops]
    run("prior.py", *arguments, folder=tmp_path / "whole")
    folder = tmp_path / "stopped"
    for half, kill, code in (("autoencoder", signal.SIGTERM, 130), ("prior", signal.SIGKILL, -signal.SIGKILL)):
        process = ScriptProcess("prior.py", *arguments, folder=folder)
        process.wait_for(checkpoint(folder / "run" / half, 4))
        os.kill(process.pid, kill)
        assert process.wait() == code, process.output()
        assert not (folder / "run" / "prior" / "base").exists()
    run("prior.py", *arguments, folder=folder)
    for part in ("unet", "vae"):
        name = f"run/prior/base/{part}/diffusion_pytorch_model.safetensors"
        assert_same_tensors(tmp_path / "whole" / name, folder / name)
    for name in ("run/prior/base/vae/config.json", "run/prior/base/icmsr_base.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes(), name


SCRIPTS = {"nano_base": "prior", "nano_autoencoder": "prior", "teacher_view": "teacher_view"}
SCRIPTS |= {name: name for name in ("prior", "adapter", "collapse", "ablation")}


@pytest.mark.parametrize("config", sorted((ROOT / "train" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_configurations_are_valid(config, monkeypatch):
    """Every key and value of them, by the script that takes them."""
    name = SCRIPTS.get(config.stem) or SCRIPTS.get(config.stem.split("_")[-1], "distill")
    script = load_script(name, monkeypatch)
    parsed = parse_config(script.Config, ["--config", str(config)])
    assert (parsed.out if name == "teacher_view" else parsed.run) == f"runs/{config.stem}"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--loop.imagse=3"], 2, ["imagse"]),
        (["--loop.images=many"], 2, ["images"]),
        (["--data.folders=['/none/at/all']", "--data.synthetic=0.5"], 1, ["/none/at/all"]),
        (["--data.synthetic=0.5"], 1, ["data.folders is empty"]),
        (["--generator.losses.icm=1"], 1, ["icm needs 1 adapter", "colormap, edges", "train/adapter.py"]),
        (["--generator.losses.icm=-1"], 1, ["loss weights must not be negative"]),
        (["--generator.losses.warmup={lpips: 3}"], 1, ["warmup", "lpips", "perceptual"]),
        (["--generator.losses.icm=1", "--condition.kind=text"], 1, ["text encoder"]),
        (["--generator.losses.icm=1", "--condition.adapters=['/none']"], 1, ["/none", "no such adapter"]),
        (["--condition.kind=depth"], 1, ["unknown structure 'depth'", "colormap"]),
        (["--condition.cells=65"], 1, ["between 1 and 64, got 65"]),
        (["--condition.source=output"], 1, ["truth, input", "output"]),
        (["--generator.perceptual.kind=lpips"], 1, ["perceptual.weights", "metric_weights.py", "decoder"]),
        (["--generator.networks.weights=some"], 1, ["lora, whole", "some"]),
        (["--generator.networks.base_dtype=bf16"], 1, ["base_dtype bf16 needs loop.precision bf16"]),
        (
            ["--generator.networks={weights: whole, train_decoder: true}", "--generator.losses.icm=1"],
            1,
            ["frozen decoder"],
        ),
        (["--generator.auxiliary_steps=0"], 1, ["auxiliary_steps must be at least 1, got 0"]),
        (["--generator.timesteps.law=square"], 1, ["uniform, cubic", "square"]),
        (["--generator.prediction=x0"], 1, ["prediction", "x0", "residual"]),
        (["--generator.timestep=1000"], 1, ["1000", "999"]),
        (["--generator.prediction=v"], 1, ["generator.prediction is v", "predicts eps"]),
        (["--condition.canny_low=300"], 1, ["low <= high", "300"]),
        (["--base=/none/base"], 1, ["/none/base"]),
        (["--data.crop=33"], 1, ["multiple of 32", "33"]),
        (["--device=toaster"], 1, ["device toaster cannot be used here", "try auto or cpu"]),
        (["--loop.workers=-1"], 1, ["workers must be at least 0, got -1"]),
        (["--loop.betas=[0.9,1.0]"], 1, ["betas must be at least 0 and below 1"]),
        (["--loop.learning_rate=.nan"], 1, ["learning_rate must be above 0, got nan"]),
        (["--loop.batch=0"], 1, ["batch must be at least 1, got 0"]),
    ],
)
def test_wrong_flags_end_with_their_code_and_name_the_value(tmp_path, base, flags, code, words, monkeypatch, capsys):
    # In this process, because starting Python anew takes seconds.
    script = load_script("distill", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, distill(base, tmp_path / "run")), *flags])
    try:
        given = run_script(script.main)
    except SystemExit as stop:
        given = stop.code
    assert given == code
    errors = capsys.readouterr().err
    for word in words:
        assert word in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_another_configuration_in_the_same_folder_is_refused(tmp_path, base):
    run("distill.py", *distill(base, "run", 4), folder=tmp_path)
    before = checkpoint(tmp_path / "run", 4).read_bytes()
    errors = run("distill.py", *distill(base, "run", 4, learning_rate=0.5), folder=tmp_path, code=1)
    assert "another configuration" in errors
    assert checkpoint(tmp_path / "run", 4).read_bytes() == before
