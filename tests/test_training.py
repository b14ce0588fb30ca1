"""The training scripts, run for real at toy size, and what they are made of."""

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from icmsr_core.base_folder import open_base
from icmsr_core.color import wavelet_color_fix
from icmsr_core.diffusers_backbone import build_networks, load_backbone
from icmsr_core.errors import IcmsrError
from icmsr_core.generator_file import load_generator
from icmsr_core.one_step import UpscaleSettings, upscale
from icmsr_core.train.data import DataConfig, TrainingPairs, make_loader
from icmsr_core.train.generator import GeneratorConfig, GeneratorTask, LossWeights
from icmsr_core.train.loop import LoopConfig, averaged, learning_rate
from icmsr_core.train.networks import NetworkConfig
from icmsr_core.train.reconstruction import charbonnier, fourier_l1, gradient_l1, with_low_frequencies
from icmsr_core.train.script import run_script
from tests.model_files import write_base
from tests.script_process import ScriptProcess, start_server

ROOT = Path(__file__).resolve().parents[1]
TINY = NetworkConfig(latent_channels=4, vae_channels=(32, 32, 32, 32), unet_channels=(32, 64), vae_groups=4)
DATA = ["--data.synthetic=1", "--data.crop=32", "--data.folders=[]"]
TINY_FLAGS = [
    "--networks.latent_channels=4", "--networks.vae_channels=[32,32,32,32]", "--networks.unet_channels=[32,64]",
]


def loop_flags(name: str, images: int, **more: object) -> list[str]:
    values = {"images": images, "batch": 2, "precision": "fp32", "workers": 0, "warmup_images": 4, "save_every": 4,
              "log_every": 2, **more}
    return [f"--{name}.{key}={value}" for key, value in values.items()]


def run(name: str, *arguments: object, folder: Path, code: int = 0) -> str:
    process = ScriptProcess(name, *arguments, folder=folder)
    assert process.wait() == code, process.output()
    return process.output()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), TINY)


def distill(base: Path, folder: Path | str, images: int = 24, **more: object) -> list[object]:
    return ["--run", folder, "--base", base, *DATA, *loop_flags("loop", images, **more)]


def test_prior_then_distill_then_upscale(tmp_path):
    start_server()
    # The one run with a Python of its own, from another folder, as a user types it.
    prior = [sys.executable, ROOT / "train" / "prior.py", "--run", tmp_path / "prior", *DATA, *TINY_FLAGS,
             *loop_flags("autoencoder", 8), *loop_flags("prior", 8)]
    done = subprocess.run(list(map(str, prior)), capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    base = tmp_path / "prior" / "prior" / "base"
    latents = load_backbone(base).encode(torch.rand(8, 3, 32, 32) * 2 - 1)
    assert latents.shape == (8, 4, 4, 4)
    run("distill.py", *distill(base, tmp_path / "run", 8), folder=tmp_path)
    generator = load_generator(tmp_path / "run" / "generator.safetensors")
    assert generator.info.base_hash == open_base(base).hash()
    assert generator.info.training["loop"]["images"] == 8
    backbone = load_backbone(base, tmp_path / "run" / "generator.safetensors")
    result = upscale(backbone, torch.rand(1, 3, 9, 14), UpscaleSettings())
    assert result.shape == (1, 3, 36, 56)
    assert bool(result.isfinite().all())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [2, 4, 6, 8]
    assert all({"loss", "psnr", "lr", "grad"} <= set(line) for line in lines)
    assert Image.open(tmp_path / "run" / "grids" / "00000008.png").size == (64, 96)


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base) -> Path:
    """The run folder of a distillation that nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("distill.py", *distill(base, "run"), folder=folder)
    return folder / "run"


@pytest.mark.parametrize(("kill", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGKILL, 0)])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, base, uninterrupted, kill, workers):
    # The folder's name is part of the configuration, so the stopped run has the same one inside another folder.
    arguments = distill(base, "run", workers=workers)
    process = ScriptProcess("distill.py", *arguments, folder=tmp_path)
    process.wait_for(tmp_path / "run" / "state.safetensors")
    os.kill(process.pid, kill)
    assert process.wait() == (-kill if kill == signal.SIGKILL else 130), process.output()
    assert not (tmp_path / "run" / "generator.safetensors").exists()
    run("distill.py", *arguments, folder=tmp_path)
    assert_same_tensors(uninterrupted / "generator.safetensors", tmp_path / "run" / "generator.safetensors")
    positions = [json.loads(line)["images"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert positions[-1] == 24


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_the_state_too(tmp_path, base, kill):
    """As `timeout`, a scheduler or Ctrl-C sends it: the data workers get it as well and must outlive the loop."""
    process = ScriptProcess("distill.py", *distill(base, "run", 4000, workers=2), folder=tmp_path)
    state = tmp_path / "run" / "state.safetensors"
    process.wait_for(state)
    os.killpg(process.pid, kill)
    assert process.wait() == 130, process.output()
    assert "the same command goes on from here" in process.output()
    assert "Traceback" not in process.output()
    with safe_open(str(state), framework="pt") as file:
        saved = int(file.metadata()["images"])
    assert f"stopped at {saved} images" in process.output()


def test_a_prior_stopped_in_both_halves_ends_like_one_that_was_not(tmp_path):
    arguments = ["--run", "run", *DATA, *TINY_FLAGS, *loop_flags("autoencoder", 24), *loop_flags("prior", 24)]
    run("prior.py", *arguments, folder=tmp_path / "whole")
    folder = tmp_path / "stopped"
    for half, kill, code in (("autoencoder", signal.SIGTERM, 130), ("prior", signal.SIGKILL, -signal.SIGKILL)):
        process = ScriptProcess("prior.py", *arguments, folder=folder)
        process.wait_for(folder / "run" / half / "state.safetensors")
        os.kill(process.pid, kill)
        assert process.wait() == code, process.output()
        assert not (folder / "run" / "prior" / "base").exists()
    run("prior.py", *arguments, folder=folder)
    for part in ("unet", "vae"):
        name = f"run/prior/base/{part}/diffusion_pytorch_model.safetensors"
        assert_same_tensors(tmp_path / "whole" / name, folder / name)
    for name in ("run/prior/base/vae/config.json", "run/prior/base/icmsr_base.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--loop.imagse=3"], 2, ["imagse"]),
        (["--loop.images=many"], 2, ["images"]),
        (["--data.folders=['/none/at/all']", "--data.synthetic=0.5"], 1, ["/none/at/all"]),
        (["--data.synthetic=0.5"], 1, ["data.folders is empty"]),
        (["--generator.losses.icm=1"], 1, ["losses.icm", "0"]),
        (["--generator.prediction=x0"], 1, ["prediction", "x0", "residual"]),
        (["--generator.timestep=1000"], 1, ["1000", "999"]),
        (["--base=/none/base"], 1, ["/none/base"]),
        (["--data.crop=33"], 1, ["multiple of 32", "33"]),
        (["--device=toaster"], 1, ["device toaster cannot be used here", "try auto or cpu"]),
        (["--loop.workers=-1"], 1, ["workers must be at least 0, got -1"]),
        (["--loop.betas=[0.9,1.0]"], 1, ["betas must be at least 0 and below 1"]),
        (["--loop.learning_rate=.nan"], 1, ["learning_rate must be above 0, got nan"]),
        (["--loop.batch=0"], 1, ["batch must be at least 1, got 0"]),
    ],
)
def test_wrong_configurations(tmp_path, base, flags, code, words, monkeypatch, capsys):
    # In this process, because starting Python anew takes seconds.
    spec = importlib.util.spec_from_file_location("distill_script", ROOT / "train" / "distill.py")
    distill_script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(distill_script)
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, distill(base, tmp_path / "run")), *flags])
    try:
        given = run_script(distill_script.main)
    except SystemExit as stop:
        given = stop.code
    assert given == code
    errors = capsys.readouterr().err
    for word in words:
        assert word in errors
    assert not (tmp_path / "run").exists()


def test_another_configuration_in_the_same_folder_is_refused(tmp_path, base):
    run("distill.py", *distill(base, "run", 4), folder=tmp_path)
    before = (tmp_path / "run" / "state.safetensors").read_bytes()
    errors = run("distill.py", *distill(base, "run", 4, learning_rate=0.5), folder=tmp_path, code=1)
    assert "another configuration" in errors
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == before


def photographs(folder: Path, count: int = 4) -> Path:
    random = np.random.default_rng(5)
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def batches(config: DataConfig, start: int, workers: int, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    return list(make_loader(TrainingPairs(config, seed), 3, start, 12, workers))


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    config = DataConfig((str(photographs(tmp_path)),), synthetic=0.4, crop=32)
    whole = batches(config, 0, 0)
    assert len(whole) == 4
    for other, offset in ((batches(config, 0, 2), 0), (batches(config, 6, 1), 2)):
        assert len(other) == 4 - offset
        for a, b in zip(whole[offset:], other):
            assert torch.equal(a["sharp"], b["sharp"])
            assert torch.equal(a["low"], b["low"])
    assert whole[0]["sharp"].shape == (3, 3, 32, 32)
    assert whole[0]["low"].shape == (3, 3, 8, 8)
    assert not torch.equal(whole[0]["sharp"], batches(config, 0, 0, seed=4)[0]["sharp"])


def test_unreadable_and_small_photographs_are_passed_over(tmp_path, caplog):
    photographs(tmp_path, 1)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    pairs = TrainingPairs(DataConfig((str(tmp_path),), synthetic=0, crop=64), 0)
    with caplog.at_level(logging.WARNING):
        samples = [pairs[index]["sharp"] for index in range(20)]
    assert all(float(sample.float().std()) > 20 for sample in samples)  # the one good picture, not a blank
    assert [record.message for record in caplog.records if "broken.jpg" in record.message]
    for path in tmp_path.glob("[0-9].png"):
        path.unlink()
    with pytest.raises(IcmsrError, match=r"smaller than 64 px"):
        TrainingPairs(DataConfig((str(tmp_path),), synthetic=0, crop=64), 0)[0]


def make_task(base: Path, config: GeneratorConfig) -> GeneratorTask:
    folder = open_base(base)
    unet, vae = build_networks(folder)
    return GeneratorTask(unet, vae, folder, folder.prompt_embedding(), config, {})


BATCH = {
    "sharp": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "low": torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("decoder", [True, False])
def test_gradients_reach_what_is_trained(tmp_path, base, decoder):
    task = make_task(base, GeneratorConfig(train_decoder=decoder, zero_output=False))
    before = {key: value.clone() for key, value in task.vae.decoder.state_dict().items()}
    trained = [p for module in task.modules().values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    task.losses(BATCH, torch.Generator())["loss"].backward()

    def reached(module: nn.Module) -> bool:
        return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())

    assert reached(task.vae.encoder)
    assert reached(task.unet)
    assert reached(task.vae.decoder) == decoder
    optimizer.step()
    same = all(torch.equal(value, before[key]) for key, value in task.vae.decoder.state_dict().items())
    assert same != decoder
    weights = load_generator(task.export(tmp_path)[0])
    assert any(key.startswith("decoder.") for key in weights.vae.tensors) == decoder
    assert any(key.startswith("encoder.") for key in weights.vae.tensors)


def test_zero_output_starts_as_the_autoencoder(base):
    task = make_task(base, GeneratorConfig(zero_output=True, color_fix=False))
    given = task._input(BATCH)
    with torch.no_grad():
        plain = task.vae.decode(task.vae.encode(given).latent_dist.mode()).sample
        assert torch.allclose(task._generate(BATCH), plain, atol=1e-5)


def test_exported_generator_is_the_trained_network(tmp_path, base):
    """The training's own forward pass and the inference path give the same picture from the same weights."""
    task = make_task(base, GeneratorConfig(zero_output=False))
    for module in task.modules().values():
        module.half().float()  # the file holds 16 bits: with weights that fit, nothing is rounded
    backbone = load_backbone(base, task.export(tmp_path)[0])
    result = upscale(backbone, BATCH["low"].float() / 255, UpscaleSettings(color_fix="none"))
    with torch.no_grad():
        expected = task._generate(BATCH).add(1).div(2).clamp(0, 1)
    assert (result - expected).abs().max() < 5e-4


def test_reconstruction_losses_against_numpy():
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 12, 10, generator=random, dtype=torch.float64) for _ in range(2))
    x, y = a.numpy(), b.numpy()
    d = x - y
    assert charbonnier(a, b).item() == pytest.approx(np.sqrt(d**2 + 1e-6).mean(), abs=1e-12)
    expected = np.abs(np.diff(d, axis=3)).mean() + np.abs(np.diff(d, axis=2)).mean()
    assert gradient_l1(a, b).item() == pytest.approx(expected, abs=1e-12)
    spectra = [np.abs(np.fft.rfft2(image, norm="ortho")) for image in (x, y)]
    assert fourier_l1(a, b).item() == pytest.approx(np.abs(spectra[0] - spectra[1]).mean(), abs=1e-4)
    shifted = torch.roll(a, (3, 2), dims=(2, 3))
    assert fourier_l1(a, shifted).item() == pytest.approx(0, abs=1e-6)  # blind to phase


def test_the_loss_sees_the_colour_correction_of_inference():
    random = torch.Generator().manual_seed(0)
    result, reference = (torch.rand(2, 3, 45, 70, generator=random) for _ in range(2))
    leaf = result.clone().requires_grad_()
    corrected = with_low_frequencies(leaf, reference)
    assert (corrected - wavelet_color_fix(result, reference)).abs().max() < 1e-6
    corrected.square().sum().backward()
    assert float(leaf.grad.abs().sum()) > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(with_low_frequencies(result, reference), corrected), "float32 whatever the networks run in"


def test_averaged_puts_the_live_weights_back():
    layer = nn.Linear(2, 2)
    live = layer.weight.detach().clone()
    average = {"weight": torch.zeros(2, 2)}
    seen = []

    def interrupted_export() -> None:
        with averaged({"weight": layer.weight}, average):
            seen.append(layer.weight.detach().clone())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        interrupted_export()
    assert torch.equal(seen[0], average["weight"])
    assert torch.equal(layer.weight, live)


def test_learning_rate_schedule():
    config = LoopConfig(images=1000, batch=10, warmup_images=100, learning_rate=0.1)
    rates = [learning_rate(config, images) for images in range(0, 1001, 10)]
    assert rates[:11] == sorted(rates[:11])
    assert max(rates) == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert learning_rate(config, 550) == pytest.approx(0.05)


@pytest.mark.parametrize("precision", ["int8", ""])
def test_loop_configuration_is_checked(precision):
    with pytest.raises(IcmsrError, match="precision"):
        LoopConfig(precision=precision)


def test_losses_with_icm_are_refused_until_they_exist():
    with pytest.raises(IcmsrError, match="icm"):
        LossWeights(icm=1.0)


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_base_files_are_readable_by_others(base):
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in base.rglob("*") if path.is_file())
