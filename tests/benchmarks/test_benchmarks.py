"""The benchmarks at tiny sizes: what they count, what their reference does, and that each prints its table."""

import json
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from icmsr_core.train.networks.bases import NetworkConfig, make_unet, make_vae, save_base
from icmsr_core.weights.base import BaseInfo

pytestmark = pytest.mark.long

NARROW = 0.05
"""Share of SD2.1's widths: 64 channels in the UNet, 32 in the VAE."""
CPU = torch.device("cpu")


def table(text: str) -> list[dict[str, str]]:
    """The lines of the only Markdown table in `text`, by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_inference_prints_a_line_for_each_procedure_and_compares_their_times(
    load_benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    options = ["--width", str(NARROW), "--sizes", "64", "--runs", "2", "--warmup", "0", "--threads", "1"]
    assert load_benchmark("inference").main([*options, "--clock", "cpu", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    rows = table(said)
    assert [row["model, procedure, precision"] for row in rows] == [
        "sd21 x 0.05, reference, fp32",
        "sd21 x 0.05, ICM-SR, fp32",
        "nano, ICM-SR, fp32",
    ]
    assert "medians of 2 runs after 0, cpu clock; 1 threads; matmul fp32" in said
    reference, ours, nano = rows
    for row in rows:
        stages = [float(row[f"{stage} s"]) for stage in ("encode", "unet", "decode")]
        assert min(stages) > 0
        assert float(row["peak GB"]) > 0.05
        assert row["matmul"].endswith("%")
    ratio = float(reference["total s"]) / float(ours["total s"])
    assert float(ours["x faster, same precision"]) == pytest.approx(ratio, rel=0.02)
    assert ours["x faster than fp32"] == ours["x faster, same precision"]
    assert reference["x faster, same precision"] == nano["x faster, same precision"] == "-"
    values = {entry["procedure"]: entry for entry in json.loads(out.read_text()) if entry["model"] == "sd21"}
    assert [len(entry["runs"]) for entry in values.values()] == [2, 2]
    # LoRA beside the weights and the text encoder are work, in encoding and in the UNet, and none in decoding.
    more = [one / two for one, two in zip(values["reference"]["operations"], values["ICM-SR"]["operations"])]
    assert more[0] > 1.05
    assert more[1] > 1.05
    assert more[2] == pytest.approx(1)


def test_inference_counts_the_operations_of_a_tiny_vae(
    load_benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.json"
    options = ["--models", "sd21", "--width", str(NARROW), "--sizes", "64", "--runs", "1", "--threads", "1"]
    assert load_benchmark("inference").main([*options, "--warmup", "0", "--tiny", "--json", str(out)]) == 0
    reference, _, tiny = table(capsys.readouterr().out)
    assert tiny["model, procedure, precision"] == "sd21 x 0.05, ICM-SR with a tiny VAE, fp32"
    ratio = float(reference["total s"]) / float(tiny["total s"])
    assert float(tiny["x faster, same precision"]) == pytest.approx(ratio, rel=0.02)
    encode, _, decode = json.loads(out.read_text())[2]["operations"]
    # TAESD's own work, whatever the width: 0.122 and 0.141 TFLOP at 512 px.
    assert encode == pytest.approx(0.122e12 / 64, rel=0.05)
    assert decode == pytest.approx(0.141e12 / 64, rel=0.05)


def test_gpu_prints_steps_and_batches_with_their_ratios(load_benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    """The rehearsal on a CPU that its help names, with fewer lines."""
    options = ["--device", "cpu", "--width", str(NARROW), "--sizes", "128", "64", "--dtypes", "fp32", "--runs", "1"]
    assert load_benchmark("gpu").main([*options, "--no-tests"]) == 0
    steps, batches = capsys.readouterr().out.split("The UNet, tiles together:")
    rows = table(steps)
    assert [(row["model, precision"], row["px"]) for row in rows] == [
        ("sd21 x 0.05, fp32", "64"),
        ("sd21 x 0.05, fp32", "128"),
        ("nano, fp32", "64"),
        ("nano, fp32", "128"),
    ]
    for row in rows:
        ours = float(row["TFLOP"]) / float(row["total s"])
        assert float(row["rate, TFLOP/s"]) == pytest.approx(ours, rel=0.5)  # of rounded numbers
    small, large = (float(row["total s"]) / int(row["px"]) ** 2 for row in rows[2:])
    assert float(rows[3]["against the first"]) == pytest.approx(large / small, rel=0.05)
    for row in table(batches):
        one, eight = float(row["ms a tile, 1"]), float(row["ms a tile, 8"])
        assert float(row["x faster, 8"]) == pytest.approx(one / eight, rel=0.05)


def test_gpu_says_that_there_is_no_accelerator(load_benchmark, monkeypatch, capsys) -> None:
    benchmark = load_benchmark("gpu")
    monkeypatch.setattr(benchmark, "pick_device", lambda name: torch.device("cpu"))
    assert benchmark.main([]) == 3
    assert "no accelerator: torch finds no CUDA, ROCm, XPU or MPS device here" in capsys.readouterr().err


def test_a_line_that_fails_does_not_end_the_run(
    load_benchmark, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inference, measurement = load_benchmark("inference"), load_benchmark("_measurement")
    found = iter([measurement.ChildFailed("the process died"), None])

    def in_child(function, case):
        error = next(found)
        if error is not None:
            raise error
        run = measurement.Run((1.0, 2.0, 3.0), (0.0, 0.0, 0.0))
        return measurement.Measurement((run,), (1e12, 2e12, 3e12), 5e9, 2e12, 1)

    monkeypatch.setattr(measurement, "in_child", in_child)
    assert inference.main(["--models", "nano", "--sizes", "64", "128"]) == 1
    first, second = table(capsys.readouterr().out)
    assert "the process died" in first.values()
    assert (second["total s"], second["TFLOP"], second["matmul"], second["peak GB"]) == ("6.00", "6.00", "50%", "5.00")


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("inference", ["--sizes", "500"], "multiples of 64 from 64 to 16384, got 500"),
        ("inference", ["--width", "2"], "above 0 and at most 1, got 2"),
        ("inference", ["--tile", "100"], "try 128"),
        ("inference", ["--device", "nowhere"], "device nowhere cannot be used here"),
        ("inference", ["--runs", "0"], "--runs must be at least 1"),
        ("tile_memory", ["--tiles", "100"], "--tiles must be multiples of 64, got [100]"),
        ("tile_memory", ["--batches", "0"], "--batches must be at least 1"),
        ("fidelity", ["--pairs", "."], "lr: no such folder"),
        ("fidelity", ["--pairs", ".", "--fidelities", "3"], "fidelity must be a number from 0 to 2, got 3"),
        ("scaling", ["--megapixels", "0"], "above 0 and at most 1024"),
        ("scaling", ["--aspect", "-1"], "--aspect must be above 0"),
    ],
)
def test_wrong_flags_end_with_2_and_name_the_value(
    load_benchmark, script: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_benchmark(script).main(options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_scaling_prints_time_and_memory_for_each_size(load_benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_benchmark("scaling").main(["--megapixels", "0.01", "0.02", "--aspect", "2", "--threads", "1"]) == 0
    first, second = table(capsys.readouterr().out)
    assert (first["px"], second["px"]) == ("144 x 72", "204 x 104")
    assert first["against the first"] == "+0%"
    assert float(second["s per megapixel"]) > 0
    assert float(first["peak MB"]) > 50


def test_fidelity_measures_bicubic_and_every_fidelity_and_plots_them(
    load_benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        for folder, side in (("lr", 16), ("hr", 64)):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / f"{name}.png"), random.integers(0, 256, (side, side, 3), np.uint8))
    plot = tmp_path / "new" / "curve.png"
    options = ["--pairs", str(tmp_path), "--every", "2", "--threads", "1", "--plot", str(plot)]
    assert load_benchmark("fidelity").main([*options, "--fidelities", "1", "0"]) == 0
    said = capsys.readouterr().out
    assert "means of 2 pairs" in said
    bicubic, faithful, realistic = table(said)
    assert [row["fidelity"] for row in (bicubic, faithful, realistic)] == ["bicubic", "0", "1"]
    assert len({tuple(list(row.values())[1:]) for row in (bicubic, faithful, realistic)}) == 3
    assert cv2.imread(str(plot)).shape[1] > 600


def test_fidelity_takes_the_mean_of_the_pictures_that_a_measure_is_defined_for(
    load_benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flat picture has no high frequencies to compare with."""
    random = np.random.default_rng(0)
    for folder, side in (("lr", 16), ("hr", 64)):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "noise.png"), random.integers(0, 256, (side, side, 3), np.uint8))
        cv2.imwrite(str(tmp_path / folder / "flat.png"), np.full((side, side, 3), 90, np.uint8))
    options = ["--pairs", str(tmp_path), "--threads", "1", "--fidelities", "0"]
    assert load_benchmark("fidelity").main(options) == 0
    both = table(capsys.readouterr().out)
    for folder in ("lr", "hr"):
        (tmp_path / folder / "flat.png").unlink()
    assert load_benchmark("fidelity").main(options) == 0
    alone = table(capsys.readouterr().out)
    assert [row["high-frequency ratio"] for row in both] == [row["high-frequency ratio"] for row in alone]
    assert [row["PSNR-Y"] for row in both] != [row["PSNR-Y"] for row in alone]


def test_tile_memory_grows_with_tile_and_batch(load_benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiles", "128", "256", "--batches", "1", "2", "--parts", "unet", "decoder", "--threads", "1"]
    assert load_benchmark("tile_memory").main([*options, "--clock", "cpu"]) == 0
    rows = table(capsys.readouterr().out)
    assert [(row["part"], row["tile"], row["batch"]) for row in rows] == [
        ("unet", "128", "1"),
        ("unet", "128", "2"),
        ("unet", "256", "1"),
        ("unet", "256", "2"),
        ("decoder, bounded", "128", "1"),
        ("decoder, bounded", "256", "1"),
    ]
    assert all(float(row["s per megapixel"]) > 0 for row in rows)
    # Two tiles of four times the area: 8 times the cells. What the libraries keep from the pass before blurs the rest.
    assert float(rows[3]["MB"]) > 3 * float(rows[0]["MB"]) > 0
    # Nano's latent has a cell for 4 x 4 pixels.
    assert float(rows[3]["bytes per cell"]) == pytest.approx(16 * float(rows[3]["bytes per pixel"]), rel=0.02)


@pytest.mark.slow
@pytest.mark.comfy
def test_node_overhead_compares_the_node_with_the_library_on_the_same_result(
    load_benchmark, comfyui: Path, comfy_python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_benchmark("node_overhead")
    assert script.main(["--size", "128", "--runs", "2", "--threads", "1", "--clock", "cpu"]) == 0
    said = capsys.readouterr().out
    (row,) = table(said)
    assert "2 pairs, cpu clock; largest difference of the two results 0.0e+00" in said
    assert float(row["node s"]) > 0
    assert float(row["library s"]) > 0
    assert row["overhead"][0] in "+-"


def test_operations_are_counted(load_benchmark) -> None:
    """2 per multiply-add, attention on the CPU too; each stage has its own."""
    measurement = load_benchmark("_measurement")
    unet = torch.nn.Linear(8, 4, bias=False)
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 24, 8)

    def procedure() -> torch.Tensor:
        F.conv2d(torch.randn(1, 3, 10, 10), torch.randn(5, 3, 3, 3))
        for _ in range(3):
            unet(torch.randn(6, 8))
        return F.scaled_dot_product_attention(q, k, k)

    watch = measurement.Stopwatch(CPU)
    with torch.inference_mode():
        run = measurement.run_in_stages(procedure, unet, watch, count=True)
        assert measurement.run_in_stages(procedure, unet, watch).operations == (0, 0, 0)
    assert run.operations == (2 * 5 * 27 * 64, 3 * 2 * 6 * 8 * 4, 2 * 2 * 2 * 16 * 24 * 8)
    with pytest.raises(RuntimeError, match="never ran the UNet"):
        measurement.run_in_stages(lambda: q, unet, watch)
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_counting_leaves_attention_in_one_piece(load_benchmark) -> None:
    """In inference mode the counter would turn it into matrix products and hold their matrix of scores, 64 MiB here."""
    measurement, q = load_benchmark("_measurement"), torch.randn(1, 1, 4096, 8)
    counter = measurement.FlopCounterMode(display=False, custom_mapping=measurement._uncounted())
    with torch.inference_mode(), counter:
        F.scaled_dot_product_attention(q, q, q)
    assert {str(name) for name in counter.get_flop_counts()["Global"]} == {"aten.scaled_dot_product_attention"}
    assert counter.get_total_flops() == 4 * 4096**2 * 8


def hold(megabytes: int) -> float:
    """The peak of a process that held so much for a moment."""
    from _measurement import Peak

    peak = Peak(CPU)
    torch.ones(40 * 2**18)
    peak.reset()
    torch.ones(megabytes * 2**18)
    return peak.bytes()


def fail(by_signal: bool) -> None:
    if by_signal:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no\nsuch thing")


def test_a_child_process_measures_its_own_peak_and_its_failure_is_told_in_one_line(load_benchmark) -> None:
    measurement = load_benchmark("_measurement")
    small, large, small_again = (measurement.in_child(hold, size) for size in (1, 201, 1))
    assert large - small == pytest.approx(200 * 2**20, rel=0.1)
    assert small_again == pytest.approx(small, rel=0.1)
    with pytest.raises(measurement.ChildFailed, match=r"^ValueError: no such thing$"):
        measurement.in_child(fail, False)
    with pytest.raises(measurement.ChildFailed, match="out of memory"):
        measurement.in_child(fail, True)


def test_processor_time_does_not_count_waiting(load_benchmark) -> None:
    measurement = load_benchmark("_measurement")
    watches = [measurement.Stopwatch(CPU, clock) for clock in measurement.CLOCKS]
    before = [watch.now() for watch in watches]
    __import__("time").sleep(0.3)
    wall, processor = (watch.now() - start for watch, start in zip(watches, before))
    assert wall >= 0.3
    assert processor < 0.2


def test_the_reference_s_networks_have_as_many_parameters_as_the_published_ones(load_benchmark) -> None:
    """Parameters of SD2.1's UNet and VAE, from the configurations alone."""
    networks = load_benchmark("_sd_networks")
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config = networks.sd_unet_config(networks.narrowed(networks.SD_WIDTHS, 1, 64), 1024, linear=True)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
        vae = AutoencoderKL.from_config(networks.sd_vae_config(networks.narrowed(networks.SD_VAE_WIDTHS, 1, 32)))
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == 865.9
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == 83.7
    assert sum(map(len, networks.unet_targets(unet).values())) == 258


def test_the_reference_does_what_osediff_does(load_benchmark) -> None:
    networks = load_benchmark("_sd_networks")
    settings = networks.ReferenceSettings(latent_tile=8, latent_overlap=2, encoder_tile=64, decoder_tile=8)
    torch.manual_seed(0)
    reference = networks.Reference(NARROW, CPU, torch.float32, settings)
    assert reference.unet.active_adapters() == ["default_encoder", "default_decoder", "default_others"]
    # Beside the weights and active everywhere; these widths are all one, so that two shortcuts fewer are there.
    for network, count in ((reference.unet, 256), (reference.vae, 30)):
        layers = [module for module in network.modules() if hasattr(module, "lora_B")]
        assert len(layers) == count
        assert all(set(layer.lora_B) <= set(layer.active_adapters) and not layer.merged for layer in layers)
    calls = []
    reference.unet.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape))
    image = torch.rand(1, 3, 24, 24)
    one = reference.upscale(image, 96)
    assert one.shape == (1, 3, 96, 96)
    assert calls == [torch.Size([1, 4, 8, 8])] * 4  # latent of 12: tiles at 0 and 4 along each axis
    assert not torch.equal(reference.upscale(image, 96), one)  # a sampled posterior
    calls.clear()
    reference.upscale(image, 64)
    assert calls == [torch.Size([1, 4, 8, 8])]
    assert reference.notes == () or reference.text_encoder is None


def test_the_reference_s_tiles_overlap_under_a_gaussian_window(load_benchmark) -> None:
    networks = load_benchmark("_sd_networks")
    assert networks.tile_starts(256, 96, 32) == [0, 64, 128, 160]
    assert networks.tile_starts(96, 96, 32) == [0]
    assert networks.tile_starts(97, 96, 32) == [0, 1]
    window = networks.gaussian_window(96)
    assert window.dtype == torch.float64
    assert 3e-6 < float(window[:, 0].max() / window.max()) < 6e-6
    assert torch.equal(window, window.flip(1))
    assert not torch.equal(window, window.flip(0))


@pytest.mark.parametrize("name", ["inference", "scaling", "tile_memory"])
def test_help_lists_the_flags_and_ends_with_0(load_benchmark, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_benchmark(name).main(["--help"])
    assert stopped.value.code == 0
    assert "--clock" in capsys.readouterr().out


def test_pair_spectra_tell_soft_pairs_from_crisp_ones(load_benchmark, tmp_path, capsys) -> None:
    """A wave with a period of 20 pixels lies in the first band, and an input of a quarter of the size keeps it; noise
    is spread over all of them, by their area, and an input without contrast keeps nothing."""
    wave = 127 + 100 * np.sin(2 * np.pi * np.arange(320) / 20)
    noise = np.random.default_rng(0).integers(0, 256, (320, 320))
    for name, sharp, low in (
        ("wave", np.tile(wave, (320, 1)), np.tile(wave.reshape(80, 4).mean(1), (80, 1))),
        ("noise", noise, np.full((80, 80), 127)),
    ):
        for part, picture in (("hr", sharp), ("lr", low)):
            folder = tmp_path / name / part
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "a.png"), np.rint(picture).astype(np.uint8).repeat(3).reshape(*picture.shape, 3))
    cv2.imwrite(str(tmp_path / "photo.png"), np.random.default_rng(1).integers(0, 256, (600, 600, 3), np.uint8))
    benchmark = load_benchmark("pair_spectra")

    def values(*arguments: str) -> list[dict[str, float]]:
        assert benchmark.main(arguments) == 0
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
        return [dict(zip(benchmark.COLUMNS[1:], map(float, line[1:]))) for line in lines]

    (one,) = values("--real", str(tmp_path / "wave"))
    assert one["original, 0.02 to 0.06"] > 0.99
    assert one["input / original, 0.02 to 0.06"] == pytest.approx(1, abs=0.15)
    (other,) = values("--real", str(tmp_path / "noise"))
    area = (0.5**2 - 0.3**2) / (0.5**2 - 0.02**2)
    assert other["original, 0.3 to 0.5"] == pytest.approx(area, abs=0.03)
    assert other["input / original, 0.3 to 0.5"] == 0
    crisp, soft = values("--photos", str(tmp_path), "--pairs", "6", "camera:1:1", "lens:1:4")
    assert soft["original, 0.3 to 0.5"] < 0.6 * crisp["original, 0.3 to 0.5"]
    assert benchmark.main(["lens:1", "--photos", str(tmp_path)]) == 1
    assert "PRESET:SHRINK:ENLARGE such as lens:1:2.5, got 'lens:1'" in capsys.readouterr().err


def test_autoencoder_prints_what_comes_back(load_benchmark, tmp_path, capsys) -> None:
    """An untrained thumbnail codec knows plain colours and coarse shapes, and no fine ones."""
    torch.manual_seed(0)
    config = NetworkConfig(8, (32, 32, 32), unet_channels=(32, 32))
    info = BaseInfo("t", "nano", licence="none")
    save_base(tmp_path / "base", make_unet(config), make_vae(config), torch.zeros(1, 32), info)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    fine = 255 * (np.indices((70, 90)).sum(0) % 2)
    cv2.imwrite(str(pictures / "fine.png"), fine.astype(np.uint8))
    cv2.imwrite(str(pictures / "plain.png"), np.full((64, 64, 3), 90, np.uint8))
    benchmark = load_benchmark("autoencoder")
    assert benchmark.main([str(tmp_path / "base"), "--pictures", str(pictures)]) == 0
    line = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    values = dict(zip(benchmark.COLUMNS, line))
    assert values["pictures"] == "2"
    assert float(values["worst"]) < 8 < 20 < 2 * float(values["PSNR, RGB"]) - float(values["worst"])
    for name, colour in benchmark.PLAIN.items():
        got = [float(value) for value in values[f"{name} {colour}"].strip("()").split(", ")]
        assert got == pytest.approx(colour, abs=0.12)
    assert benchmark.main([str(tmp_path / "none"), "--pictures", str(pictures)]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_artefacts_measures_edges_and_patterns(load_benchmark, monkeypatch, tmp_path, capsys) -> None:
    """Its truth is straight and sharp, and bicubic is known: wide, with its own overshoot."""
    benchmark = load_benchmark("artefacts")
    monkeypatch.setattr(benchmark, "SIDE", 256)
    monkeypatch.setattr(benchmark, "ANGLES", (12,))
    monkeypatch.setattr(benchmark, "TEXTURES", ("brick",))
    assert benchmark.main(["--out", str(tmp_path / "edges"), "--threads", "1"]) == 0
    edges, patterns = capsys.readouterr().out.split("\n\n")[1:]
    (row,) = table(edges)
    assert float(row["jitter, truth"]) < 0.1 < float(row["jitter, bicubic"]) < 0.5
    assert float(row["width, truth"]) == 1
    assert 4 <= float(row["width, bicubic"]) <= 6
    assert float(row["halo, truth"]) == 0
    assert [row["area, period"] for row in table(patterns)] == [
        f"{area}, {period}" for area in ("flat", "brick") for period in (2, 4, 8)
    ]
    assert {path.name for path in (tmp_path / "edges").iterdir()} == {
        "12-truth.png",
        "12-bicubic.png",
        "12-generator.png",
    }
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2


def test_flicker_is_told_of_the_input_of_bicubic_and_of_nano(
    load_benchmark, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--frames", "6", "--noise", "4", "--width", "24", "--height", "16", "--threads", "1"]
    assert load_benchmark("flicker").main(options) == 0
    rows = {row["frames"]: float(row["flicker"]) for row in table(capsys.readouterr().out)}
    assert list(rows) == ["input", "bicubic", "nano, fidelity 0", "nano, fidelity 1"]
    assert rows["input"] == pytest.approx(4, rel=0.1)  # what was added; white and black are clipped
    assert 0.4 * rows["input"] < rows["bicubic"] < rows["input"]  # interpolation averages noise
    assert min(rows.values()) > 0.5


def test_flicker_of_a_scene_without_noise_is_none(load_benchmark) -> None:
    frames = torch.rand(1, 3, 4, 4).repeat(5, 1, 1, 1)
    flicker = load_benchmark("flicker").flicker
    assert flicker(frames) == 0
    swing = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert flicker(swing) == pytest.approx(255 * 0.5**0.5)
