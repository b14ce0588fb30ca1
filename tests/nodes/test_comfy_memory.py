"""ComfyUI's memory: batches, tiles that do not fit, networks loaded in part, narrow precisions, what is given back."""

import json

import pytest
import torch

from tests.support.checkpoint_job import (
    TOLERANCE,
    Outcome,
    assert_parity,
    levels_apart,
    library,
    run_job,
    scaled_difference,
    upscale_noting,
)
from tests.support.comfy_harness import run_script

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def batches(comfyui, comfy_python, tmp_path_factory) -> dict:
    job = tmp_path_factory.mktemp("batches")
    run_script(comfy_python, comfyui, "batch_checks.py", job, timeout=600)
    return json.loads((job / "report.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(comfyui, comfy_python, tmp_path_factory) -> Outcome:
    """A Stable Diffusion 1.5 checkpoint of a sixth of the size, in one ComfyUI process."""
    return run_job(tmp_path_factory.mktemp("memory"), comfy_python, comfyui, ["sd15"], memory=True)


def test_a_batch_is_its_pictures_one_by_one(batches):
    assert batches["frames"] == {"shape": [16, 40, 72, 4], "contiguous": True, "equal": True, "different pictures": 16}


def test_the_result_is_the_only_memory_that_grows_with_the_batch(batches):
    assert batches["memory for the batch"] == ["aten.empty.memory_format"]


def test_pictures_before_the_one_that_does_not_fit_are_kept(batches):
    result = batches["out of memory"]
    assert result["calls"] == [[0, 256], [1, 256], [1, 128], [2, 128]]
    assert result["equal"] == [True, True, True]
    assert result["within"]
    assert result["last progress"][0] == result["last progress"][1]


def test_tile_batch_0_is_what_fits(batches):
    """The fewest that need no more batches than the most that fit: of 12 tiles 3 (of 3), 6 (of 6), 6 (of 8)."""
    assert batches["tile batch, cpu"] == [1, 1, True]
    tiles, chosen = batches["tile batch, card"]["tiles"], batches["tile batch, card"]["chosen"]
    assert (tiles, chosen) == (12, [1, 3, 6, 6])


LADDER = [[256, "auto"], [128, "auto"], [128, "bounded"]]
"""For 192 x 128 pixels, which are one tile of 256: bounded is then the same as exact."""


@pytest.mark.parametrize("platform", ["cuda", "mps", "cpu", "windows", "numpy"])
def test_a_lack_of_memory_of_each_kind_is_tried_with_less(batches, platform):
    """Smaller tiles, then bounded, then one line with the sizes; an exact VAE that was asked for stays exact."""
    found = batches["lacks"]
    assert found[f"{platform}, auto, bounded"] == {"tried": LADDER, "said": "not refused"}
    never = found[f"{platform}, auto, never"]
    assert never["tried"] == LADDER
    assert "out of memory with tile 128, 1 at a time, vae bounded, for 96 x 64 to 192 x 128 pixels" in never["said"]
    assert "\n" not in never["said"]
    exact = found[f"{platform}, exact, never"]
    assert exact["tried"] == [[256, "exact"], [128, "exact"]]
    assert "choose bounded instead of exact" in exact["said"]


def test_other_errors_are_not_tried_again(batches):
    for name, found in batches["lacks"].items():
        if name.startswith("other"):
            assert len(found["tried"]) == 1, name
            assert found["said"].startswith("RuntimeError: CUDA error: an illegal memory access")


def test_auto_is_bounded_where_exact_does_not_fit(batches):
    plenty, little, exact, bounded = batches["budgets"]
    assert plenty == ["auto", True]
    assert little[:2] == ["bounded", False]
    (line,) = little[2:]
    assert line.endswith("1024 x 1024 pixels: 0.5 GB of memory are free: tile 512, vae bounded")
    assert exact[:2] == ["exact", True]
    assert exact[2].endswith("the exact VAE may not fit: bounded needs less")
    assert bounded == ["bounded", False]


def test_free_memory_counts_what_core_gives_back(batches):
    found = batches["given back"]
    assert (found["dynamic"], found["older core"]) == (5e9, 4e9)
    assert (found["cpu"], found["mps"]) == (3e9, 3e9)
    assert found["unloaded"] == 1000
    assert found["kind"] == ["cuda", 4, True]
    fits, does_not = found["asked"]
    assert fits == {"memory_required": 10 + 1e9, "minimum_memory_required": 10}
    assert does_not == {"memory_required": 10, "minimum_memory_required": 10}


def test_a_bad_picture_is_found_before_the_first_is_computed(batches):
    assert batches["nan"].startswith("IcmsrError: image: NaN or infinite values in picture 3 of 4")


def test_a_result_that_cannot_be_held_is_refused_at_once(batches):
    assert batches["too many"].startswith("IcmsrError: the result, 100000000 pictures of 4096 x 4096, needs ")
    assert "upscale fewer pictures at a time" in batches["too many"]


def test_extra_model_paths_keep_their_say(batches):
    """The user's default folder comes first, and only weights files are listed."""
    assert batches["extra paths"] == {
        "deeper/both.safetensors": "mine/deeper/both.safetensors",
        "deeper/theirs.safetensors": "mine/deeper/theirs.safetensors",
        "deeper/ours.safetensors": "models/icmsr/deeper/ours.safetensors",
        "LOUD.SAFETENSORS": "models/icmsr/LOUD.SAFETENSORS",
    }


def test_memory_is_released_with_the_graph_s_outputs(checkpoint):
    """Nothing holds the networks once the graph's outputs are gone, and the process is about as small as before."""
    release = checkpoint.report["release"]
    print(release)
    assert release["alive"] == 0
    assert release["networks"] > 500
    assert release["held"] > release["networks"]
    assert release["left"] < 0.15 * release["networks"]


@pytest.mark.parametrize(("name", "least", "most"), [("half loaded", 0.2, 0.8), ("nothing loaded", 0.0, 0.1)])
def test_partial_loading_gives_the_same_picture(checkpoint, name, least, most):
    """As with --lowvram and --novram: the generator is patched into each weight as it is needed."""
    for part, (share, patches) in checkpoint.report[name].items():
        print(f"{name}: {share:.0%} of the {part} loaded, {patches} weights patched when needed")
        assert least <= share <= most
        assert patches > 0
    for key in ("latent", "output", "picture"):
        assert scaled_difference(checkpoint.results[f"{name} {key}"], checkpoint.results[f"sd15 {key}"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_checkpoints_in_other_precisions(checkpoint, name):
    """On a CPU core widens them when it reads them: the same as diffusers on the same numbers."""
    assert checkpoint.report[f"{name} file"] == ["float32"]
    assert_parity(checkpoint, name, upscale_noting(checkpoint, library(checkpoint, name, "checkpoint", "sd15")))


def test_a_unet_kept_in_half_precision(checkpoint):
    """Core merges the generator in float32, rounds and keeps it so, and casts each weight when it computes."""
    assert "float16" in checkpoint.report["fp16_unet"]["kept"]
    assert checkpoint.report["fp16_unet"]["repeated"]
    assert checkpoint.report["fp16_unet"]["warnings"] == []
    results = checkpoint.results
    difference = scaled_difference(results["fp16_unet output"], results["sd15 output"])
    levels = levels_apart(results["fp16_unet picture"], results["sd15 picture"])
    print(f"{difference:.1e}, {levels:.2f}/255")
    assert difference < 5e-3
    assert levels < 2


def test_a_unet_kept_in_eight_bits(checkpoint):
    """It works, repeats itself, and says that the generator is rounded with it."""
    report, results = checkpoint.report["fp8_e4m3fn_unet"], checkpoint.results
    assert "float8_e4m3fn" in report["kept"]
    assert report["repeated"]
    (warning,) = report["warnings"]
    assert "sd15.safetensors: this MODEL keeps its weights in float8_e4m3fn" in warning
    pair = torch.stack([results[f"{name} output"].flatten() for name in ("fp8_e4m3fn_unet", "fp8")])
    similarity = float(torch.corrcoef(pair)[0, 1])
    print(f"correlation with the generator in full precision {similarity:.3f}")
    assert similarity > 0.95


def test_a_unet_that_load_diffusion_model_keeps_in_eight_bits(checkpoint):
    """core's Load Diffusion Model with weight_dtype fp8_e4m3fn."""
    assert "float8_e4m3fn" in checkpoint.report["UNETLoader"]
    outputs = [checkpoint.results[f"{name} output"].flatten() for name in ("UNETLoader", "sd15")]
    assert float(torch.corrcoef(torch.stack(outputs))[0, 1]) > 0.95
