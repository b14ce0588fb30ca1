"""The command `icmsr`, as a user meets it: exit codes, messages, files."""

import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from PIL import Image
from safetensors.torch import load_file, save_file

from icmsr_core.cli import main as main_module
from icmsr_core.cli.main import main
from icmsr_core.pictures.files import Picture, read_picture, to_tensor, write_picture
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.one_step import upscale
from icmsr_core.upscale.settings import UpscaleSettings
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.embedded import demo_picture, embedded_base, embedded_generator
from icmsr_core.weights.generator_file import load_generator, save_generator
from tests.support.model_files import TINY, write_base, write_generator
from tests.support.pictures import write_random_picture
from tests.support.places import ROOT
from tests.support.script_process import INTERRUPTED

LARGE_LIBRARIES = ("torch", "numpy", "cv2", "PIL", "diffusers", "safetensors", "tqdm")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """With two channels a group in its UNet, so that a map of a single cell can be normalised."""
    return write_base(tmp_path_factory.mktemp("base"), replace(TINY, unet_channels=(64, 64)))


@pytest.fixture(scope="module")
def generator(base, tmp_path_factory) -> Path:
    return write_generator(tmp_path_factory.mktemp("models") / "generator.safetensors", base)


@pytest.fixture(scope="module")
def two_sets(base, tmp_path_factory) -> Path:
    return write_generator(tmp_path_factory.mktemp("models") / "two sets.safetensors", base, two_sets=True)


@pytest.fixture
def model(base, generator) -> list[str]:
    return ["--base", str(base), "--model", str(generator)]


def fails(capsys, arguments: list, code: int, *words: str) -> str:
    """`arguments` end with `code` and one line on stderr that holds `words`; returns that line."""
    arguments = [str(argument) for argument in arguments]
    if code == 2:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    else:
        assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines, "nothing on stderr"
    if code == 1:
        assert len(lines) == 1, lines
    for word in words:
        assert word in lines[-1], lines[-1]
    return lines[-1]


def test_upscale_writes_what_the_library_computes(tmp_path, model, base, generator):
    source, target = write_random_picture(tmp_path / "in.png"), tmp_path / "new" / "out.png"
    assert main(["upscale", str(source), str(target), *model, "--color-fix", "adain"]) == 0
    backbone = load_backbone(Recipe(base, generator))
    expected = upscale(backbone, to_tensor(read_picture(source).rgb), UpscaleSettings(color_fix="adain"))
    written = to_tensor(read_picture(target).rgb)
    assert written.shape == (1, 3, 48, 80)
    assert (written - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_vae_mode_is_that_of_the_settings(tmp_path, model, base, generator):
    source, target = write_random_picture(tmp_path / "in.png", 40, 32), tmp_path / "out.png"
    run = ["upscale", str(source), str(target), *model, "--tile", "64", "--overlap", "16"]
    backbone, written = load_backbone(Recipe(base, generator)), {}
    for mode in ("auto", "exact", "bounded"):
        assert main([*run, "--vae-mode", mode]) == 0
        written[mode] = to_tensor(read_picture(target).rgb)
        settings = UpscaleSettings(tile=64, overlap=16, vae=mode)
        expected = upscale(backbone, to_tensor(read_picture(source).rgb), settings)
        assert (written[mode] - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(written["auto"], written["exact"])
    assert not torch.equal(written["bounded"], written["exact"])


def test_auto_tiles_follow_the_free_memory(tmp_path, model, monkeypatch, caplog):
    source, target = write_random_picture(tmp_path / "in.png", 80, 48), tmp_path / "out.png"

    def upscaled(*flags: str) -> torch.Tensor:
        assert main(["upscale", str(source), str(target), *model, *flags]) == 0
        return to_tensor(read_picture(target).rgb)

    plain = upscaled()
    least = upscaled("--tile", "128", "--overlap", "32")  # so small a picture takes more memory in bounded mode
    assert not torch.equal(plain, least)
    for free, expected, said in ((None, plain, []), (1e12, plain, []), (0.0, least, ["tile 128, vae auto"])):
        monkeypatch.setattr("icmsr_core.cli.picture_jobs.free_memory", lambda _, free=free: free)
        caplog.clear()
        assert torch.equal(upscaled("--tile", "auto", "--batch", "auto"), expected)
        assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == said


def test_fidelity_chooses_between_two_sets(tmp_path, base, two_sets):
    source = write_random_picture(tmp_path / "in.png")
    run = ["upscale", str(source), str(tmp_path / "out.png"), "--base", str(base), "--model", str(two_sets)]
    written = {}
    for value in (None, "0", "0.5", "1"):
        assert main([*run, *(["--fidelity", value] if value else [])]) == 0
        written[value] = to_tensor(read_picture(tmp_path / "out.png").rgb)
    backbone = load_backbone(Recipe(base, two_sets, fidelity=0.5))
    expected = upscale(backbone, to_tensor(read_picture(source).rgb), UpscaleSettings())
    assert (written["0.5"] - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(written[None], written["1"])
    for one, other in (("0", "0.5"), ("0.5", "1")):
        assert (written[one] - written[other]).abs().max() > 2 / 255
    both = load_generator(two_sets)
    own = tmp_path / "with a default.safetensors"
    save_generator(own, replace(both, info=replace(both.info, realistic_default=0.5)), torch.float32)
    run[run.index(str(two_sets))] = str(own)
    assert main(run) == 0
    assert torch.equal(to_tensor(read_picture(tmp_path / "out.png").rgb), written["0.5"])
    assert main([*run, "--fidelity", "1"]) == 0
    assert torch.equal(to_tensor(read_picture(tmp_path / "out.png").rgb), written["1"])


def test_fidelity_is_checked_before_a_model_is_loaded(tmp_path, model, base, two_sets, capsys, monkeypatch):
    monkeypatch.setattr("icmsr_core.cli.main.load_networks", lambda *_: pytest.fail("a model was loaded"))
    source = write_random_picture(tmp_path / "in.png")
    run = ["upscale", source, tmp_path / "new" / "out.png"]
    single = "faithful and a realistic set of weights, this one holds a single set: omit fidelity"
    fails(capsys, [*run, *model, "--fidelity", "0"], 1, "generator.safetensors", single, "got 0")
    fails(capsys, [*run, *model, "--fidelity", "1"], 1, single)
    fails(capsys, [*run, "--model", tmp_path / "none.safetensors", "--fidelity", "1"], 1, "none.saf", "no such file")
    for value in ("2.1", "-1", "nan", "much"):
        fails(capsys, [*run, "--base", base, "--model", two_sets, f"--fidelity={value}"], 2, "0 to 2", repr(value))
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


@pytest.mark.parametrize(
    ("flags", "size"), [(["--scale", "1.5"], (30, 18)), (["--size", "33x7"], (33, 7)), (["--longest", "40"], (40, 24))]
)
def test_scale_or_size_decides_the_size_of_the_result(tmp_path, model, flags, size, capsys):
    source, target = write_random_picture(tmp_path / "in.png"), tmp_path / "out.webp"
    assert main(["upscale", str(source), str(target), *model, *flags]) == 0
    assert Image.open(target).size == size
    assert capsys.readouterr().out.startswith(f"{source}: 20 x 12 to {size[0]} x {size[1]} pixels, 1 tile")


def test_a_mask_says_where_to_work(tmp_path, model, capsys):
    """White, at another size than the picture; elsewhere the result is the enlarged picture."""
    source, target, mask = (
        write_random_picture(tmp_path / "in.png", 60, 40),
        tmp_path / "out.png",
        tmp_path / "mask.png",
    )
    white = np.zeros((20, 30, 3), np.float32)
    white[8:12, 2:6] = 1
    write_picture(mask, Picture(white))
    assert main(["upscale", str(source), str(target), *model, "--mask", str(mask)]) == 0
    said = capsys.readouterr().out
    assert "; the mask needs 1 tile instead of 1; the VAE runs over all of it" in said
    result = to_tensor(read_picture(target).rgb)
    enlarged = resize(to_tensor(read_picture(source).rgb), 160, 240)
    assert (result - enlarged)[..., 64:96, 16:48].abs().mean() > 2 / 255
    assert (result - enlarged)[..., 120:].abs().max() <= 0.5 / 255 + 1e-6


def test_an_empty_mask_is_said_and_a_missing_one_comes_before_a_model(tmp_path, model, capsys, caplog, monkeypatch):
    source, target, mask = write_random_picture(tmp_path / "in.png"), tmp_path / "out.png", tmp_path / "mask.png"
    write_picture(mask, Picture(np.zeros((5, 5, 3), np.float32)))
    assert main(["upscale", str(source), str(target), *model, "--mask", str(mask)]) == 0
    assert caplog.messages == ["the mask is all 0: the whole picture is upscaled"]
    monkeypatch.setattr(main_module, "load_networks", lambda _: pytest.fail("loaded"))
    fails(capsys, ["upscale", source, target, *model, "--mask", tmp_path / "none.png"], 1, "none.png", "no such file")


def test_alpha_and_grey_survive(tmp_path, model):
    source = write_random_picture(tmp_path / "in.png", mode="RGBA")
    assert main(["upscale", str(source), str(tmp_path / "out.png"), *model]) == 0
    result = read_picture(tmp_path / "out.png")
    alpha = to_tensor(read_picture(source).alpha)
    assert np.abs(result.alpha - resize(alpha, 48, 80)[0, 0].numpy()).max() <= 0.5 / 255 + 1e-6
    grey = write_random_picture(tmp_path / "grey.png", mode="L")
    assert main(["upscale", str(grey), str(tmp_path / "grey_out.png"), *model]) == 0
    assert Image.open(tmp_path / "grey_out.png").mode == "L"


def test_a_folder_goes_on_past_bad_files_and_ends_with_1(tmp_path, model, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_random_picture(folder / "good.png")
    write_random_picture(folder / "good.bmp")
    write_random_picture(folder / "one.jpg", 1, 1)
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").touch()
    whole = write_random_picture(folder / "corrupt.png").read_bytes()
    (folder / "corrupt.png").write_bytes(whole[: len(whole) // 2])
    shutil.move(folder / "good.bmp", folder / "scan.bmp")
    assert main(["upscale", str(folder), str(out), *model]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert [name in line for name, line in zip(("corrupt.png", "empty.png", "text.png"), lines)] == [True] * 3, lines
    assert len(lines) == 3, lines
    assert sorted(path.name for path in out.iterdir()) == ["good.png", "one.jpg", "scan.png"]
    assert Image.open(out / "one.jpg").size == (4, 4)


def test_the_bar_counts_every_picture_that_is_done(tmp_path, model, monkeypatch, capsys):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    (tmp_path / "in").mkdir()
    for index in range(3):
        write_random_picture(tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "bad.png").write_text("not a picture")
    assert main(["upscale", str(tmp_path / "in"), str(tmp_path / "out"), *model]) == 1
    assert (bars[0].unit, bars[0].n, bars[0].total) == ("picture", 4, 4)


def test_wrong_flags_end_with_2_and_name_the_value(tmp_path, model, capsys):
    source = write_random_picture(tmp_path / "in.png")
    run = ["upscale", source, tmp_path / "out.png", *model]
    fails(capsys, [*run, "--tile", "500"], 2, "multiple of 64", "500", "try 512")
    fails(capsys, [*run, "--overlap", "300"], 2, "overlap", "300")
    fails(capsys, [*run, "--scale", "9"], 2, "9", "between 1 and 8")
    fails(capsys, [*run, "--size", "big"], 2, "WIDTHxHEIGHT", "big")
    fails(capsys, [*run, "--size", "0x5"], 2, "size")
    fails(capsys, [*run, "--longest", "500", "--megapixels", "2"], 2, "--megapixels", "not allowed with", "--longest")
    fails(capsys, [*run, "--longest", "0"], 2, "longest", "0")
    fails(capsys, [*run, "--fit", "crop"], 2, "--fit crop", "--size")
    fails(capsys, [*run, "--color-fix", "magic"], 2, "magic")
    fails(capsys, [*run, "--tile", "some"], 2, "a whole number or auto", "some")
    fails(capsys, [*run, "--batch", "0"], 2, "batch", "0")
    fails(capsys, [*run, "--vae-mode", "magic"], 2, "magic", "bounded")
    fails(capsys, ["fly"], 2, "fly")
    assert not (tmp_path / "out.png").exists()


def test_missing_files_end_with_1_and_one_line_that_names_them(tmp_path, model, capsys):
    source = write_random_picture(tmp_path / "in.png")
    fails(capsys, ["upscale", tmp_path / "none.png", tmp_path / "out.png", *model], 1, "none.png", "no such file")
    fails(capsys, ["upscale", source, tmp_path / "out.gif", *model], 1, "out.gif", ".png")
    fails(capsys, ["upscale", source, source, *model], 1, "overwrite")
    fails(capsys, ["upscale", source, source / "x.png", *model], 1, "cannot write")
    fails(capsys, ["upscale", source, tmp_path / "o.png", "--model", tmp_path / "none.safetensors"], 1, "none.saf")
    fails(capsys, ["upscale", source, tmp_path / "o.png", "--base", tmp_path / "none"], 1, "no such file or folder")
    fails(capsys, ["upscale", source, tmp_path / "o.png", *model, "--device", "cuda:99"], 1, "cuda:99", "try")
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_the_output_is_checked_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("icmsr_core.cli.main.load_networks", lambda *_: pytest.fail("a model was loaded"))
    source = write_random_picture(tmp_path / "in.png")
    fails(capsys, ["upscale", source, tmp_path / "in.png" / "out.png"], 1, "cannot write")
    fails(capsys, ["demo", "--out", source], 1, "cannot write")


def test_what_is_known_beforehand_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("icmsr_core.cli.main.load_networks", lambda *_: pytest.fail("a model was loaded"))
    wide = write_random_picture(tmp_path / "wide.png", 4100, 8)
    fails(capsys, ["upscale", wide, tmp_path / "out.webp"], 1, "wide.png", "16383", "--format png")
    fails(capsys, ["upscale", wide, wide, tmp_path / "out.png"], 1, "several pictures need a folder")
    fails(capsys, ["upscale", wide], 2, "output")
    fails(capsys, ["upscale", wide, tmp_path / "o.jpg", "--quality", "0"], 2, "1 to 100", "0")
    for shard in ("0/4", "5/4", "2", "a/b", "1/0"):
        fails(capsys, ["upscale", wide, tmp_path / "o.jpg", "--shard", shard], 2, "I from 1 to N", shard)
    (tmp_path / "out.png").touch()
    assert main(["upscale", str(wide), str(tmp_path / "out.png"), "--skip-existing"]) == 0
    assert capsys.readouterr().err == "skipped: 1 whose result exists\n"
    measured = tmp_path / "no" / "dir" / "x.json"
    folders = ["--sr", tmp_path, "--hr", tmp_path]
    fails(capsys, ["evaluate", *folders, "--json", measured], 1, "x.json", "does not exist: create it first")


def test_a_mixed_folder_is_told_in_full(tmp_path, model, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        write_random_picture(folder / name, 12, 12)
    Image.new("RGB", (12, 12), (9, 9, 9)).save(folder / "c.gif")
    (folder / "notes.txt").write_text("none")
    flags = ["--recursive", "--format", "jpg", "--quality", "100"]
    assert main(["upscale", str(folder), str(out), *model, *flags]) == 0
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.jpg")) == ["a.jpg", "c.jpg", "sub/b.jpg"]
    said = capsys.readouterr()
    assert "skipped: 1 that are not pictures (.txt 1)" in said.err
    assert "3 of 3 written to" in said.out


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path, model, capsys):
    source = write_random_picture(tmp_path / "in.png")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    fails(capsys, ["upscale", source, locked / "out.png", *model], 1, "locked", "cannot write")


def test_damaged_and_foreign_weights_are_named_and_nothing_is_written(tmp_path, base, generator, capsys):
    source = write_random_picture(tmp_path / "in.png")
    bad = tmp_path / "bad.safetensors"

    def run(*words: str) -> None:
        fails(capsys, ["upscale", source, tmp_path / "out.png", "--base", base, "--model", bad], 1, "bad.saf", *words)
        assert not (tmp_path / "out.png").exists()

    data = generator.read_bytes()
    bad.write_bytes(data[:-100])
    run("not a readable .safetensors")
    bad.write_text("hello")
    run("not a readable .safetensors")
    save_file({"a": torch.zeros(1)}, bad)
    run("not an ICM-SR generator file")
    tensors = load_file(generator)
    from safetensors import safe_open

    with safe_open(generator, framework="pt") as file:
        metadata = file.metadata()
    name = next(key for key in tensors if key.endswith("lora_B.weight"))
    poisoned = tensors[name].clone()
    poisoned.view(-1)[3] = float("nan")
    save_file({**tensors, name: poisoned}, bad, metadata)
    run("NaN", name)
    values = json.loads(metadata["icmsr"])
    save_file(tensors, bad, {**metadata, "icmsr": json.dumps({**values, "family": "sd21"})})
    assert "sd21" in fails(
        capsys, ["upscale", source, tmp_path / "out.png", "--base", base, "--model", bad], 1, "family", "nano"
    )


def test_conditions_writes_colormap_edges_and_both_as_the_hint(tmp_path):
    source = write_random_picture(tmp_path / "in.png", 128, 64)
    assert main(["conditions", str(source), "--out", str(tmp_path / "c")]) == 0
    colors, edges, hint = (read_picture(tmp_path / "c" / f"in_{name}.png") for name in ("colormap", "edges", "hint"))
    assert len(np.unique(colors.rgb.reshape(-1, 3), axis=0)) <= 2  # 64 px high, 128 wide: 1 x 2 cells
    assert set(np.unique(edges.rgb)) <= {0.0, 1.0}
    assert np.array_equal(hint.alpha, edges.rgb[..., 0])
    assert np.array_equal(hint.rgb, colors.rgb)


def test_evaluate_prints_and_saves_measures_and_inspect_describes_files(tmp_path, base, generator, two_sets, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_random_picture(tmp_path / name / "p.png", 64, 64)
    arguments = ["evaluate", "--sr", str(tmp_path / "a"), "--hr", str(tmp_path / "b")]
    assert main([*arguments, "--metrics", "ssim,hf", "--json", str(tmp_path / "r.json")]) == 0
    assert "1.0000" in capsys.readouterr().out
    assert "p" in json.dumps(json.loads((tmp_path / "r.json").read_text()))
    fails(capsys, [*arguments, "--metrics", "beauty"], 1, "beauty", "psnr")
    weights = tmp_path / "weights"
    fails(
        capsys,
        [*arguments, "--metrics", "psnr,dists", "--weights-dir", str(weights)],
        1,
        str(weights / "dists.safetensors"),
        "train/metric_weights.py",
    )
    assert main(["inspect", str(generator)]) == 0
    shown = capsys.readouterr().out
    assert "residual" in shown
    assert "rank 4" in shown
    assert main(["inspect", str(two_sets)]) == 0
    shown = capsys.readouterr().out
    assert "rank 4" in shown
    assert "rank 2" in shown
    assert "realistic unet" in shown
    assert main(["inspect", str(base)]) == 0
    assert "4 channels, 1 cell per 8 px" in capsys.readouterr().out
    fails(capsys, ["inspect", tmp_path / "none.safetensors"], 1, "no such file")


@pytest.mark.long
def test_demo_upscales_the_bundled_photograph_and_gains_detail(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    width, height = Image.open(demo_picture()).size
    for word in ("nano", "cpu" if not torch.cuda.is_available() else "cuda", f"{width}x{height}", "seconds"):
        assert word in shown
    paths = [tmp_path / "demo" / name for name in ("input.png", "result.png", "side_by_side.png")]
    for path in paths:
        assert str(path) in shown
    assert Image.open(paths[1]).size == (4 * width, 4 * height)
    result, given = read_picture(paths[1]).rgb, read_picture(paths[0]).rgb
    enlarged = resize(to_tensor(given), *result.shape[:2])[0].permute(1, 2, 0).numpy()
    assert np.abs((result - enlarged).mean(axis=(0, 1))).max() <= 1 / 255
    # More detail than bicubic: the energy of differences between neighbouring pixels.
    assert np.square(np.diff(result, axis=1)).mean() > 1.1 * np.square(np.diff(enlarged, axis=1)).mean()


def test_embedded_files_describe_themselves(capsys):
    assert main(["inspect", str(embedded_generator())]) == 0
    shown = capsys.readouterr().out
    for word in ("nano", "Apache-2.0", "training", "timestep"):
        assert word in shown
    weights = [*embedded_base().rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in weights) <= 25e6


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_leaves_no_half_file(tmp_path):
    write_random_picture(tmp_path / "in.png", 500, 500)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "icmsr_core",
            "upscale",
            "in.png",
            "out/result.png",
            "--scale",
            "8",
            "--tile",
            "128",
            "--overlap",
            "64",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and so these tests if they are one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)  # the output folder is made just before the model is loaded
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in INTERRUPTED, errors
    assert "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["upscale", "--help"], 0),
        (["fly"], 2),
        (["upscale", "in.png", "out.png", "--tile", "500"], 2),
        (["upscale", "in.png", "out.png", "--fidelity", "3"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_wrong_usage_load_no_large_library(arguments, code):
    """So that they answer at once: torch alone takes seconds to import."""
    script = (
        "import sys\n"
        "from icmsr_core.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        f"print([name for name in {LARGE_LIBRARIES!r} if name in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_parser_is_built_without_large_libraries():
    script = (
        "import sys\nfrom icmsr_core.cli.arguments import make_parser\nmake_parser()\n"
        f"print([name for name in {LARGE_LIBRARIES!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_module_and_script_are_one_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "icmsr_core", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("icmsr ")
