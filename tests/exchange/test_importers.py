"""Foreign checkpoints into generator files and back: exact layouts, random tensors, each file's own arithmetic."""

import json
import math
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from icmsr_core.backbone.noise_schedule import NoiseSchedule
from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.exchange.exporters import export_generator
from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.exchange.kinds import IMPORT_KINDS, LORA_KIND
from icmsr_core.exchange.layouts import kohya_name, lora_keys, published_layout
from icmsr_core.exchange.one_step_checkpoints import PICKLED_KINDS
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import PROMPT_FILE, open_base
from icmsr_core.weights.generator_file import load_generator, save_generator
from icmsr_core.weights.tensor_files import read_tensors
from tests.support.hostile_pickle import HostileValue, assert_runs_code
from tests.support.merging import merged_part
from tests.support.model_files import random_generator
from tests.support.sd_files import unet_config, vae_config, write_sd_folder

TARGETS = (
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_in",
    "conv_shortcut",
    "conv_out",
    "proj_out",
    "proj_in",
    "ff.net.2",
    "ff.net.0.proj",
)
RANK_UNET, RANK_VAE, PEFT_ALPHA = 2, 4, 8
"""Different, so that a scale taken from the wrong network shows."""

# The peers' own use of PEFT, several adapters on one network, is what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """SD2.1's networks at a tenth of the width, with a constant prompt."""
    folder = write_sd_folder(tmp_path_factory.mktemp("base") / "sd21", width_divisor=10)
    save_file({"prompt_embedding": torch.randn(5, 96)}, folder / PROMPT_FILE)
    return folder


def load_unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base / "unet")


def targets(network: torch.nn.Module) -> list[str]:
    """Modules with a weight that end in one of the standard names."""
    names = [name.removesuffix(".weight") for name, _ in network.named_parameters() if name.endswith(".weight")]
    return [name for name in names if any(f".{name}".endswith(f".{target}") for target in TARGETS)]


def vae_targets(network: torch.nn.Module) -> list[str]:
    return [name for name in targets(network) if name.startswith("encoder.")] + ["quant_conv"]


def groups(modules: list[str]) -> dict[str, list[str]]:
    """The three adapters that OSEDiff and PiSA-SR spread the UNet's modules over."""
    split: dict[str, list[str]] = {"encoder": [], "decoder": [], "others": []}
    for name in modules:
        encoder, decoder = name.startswith(("down_blocks", "conv_in")), name.startswith(("up_blocks", "conv_out"))
        split["encoder" if encoder else "decoder" if decoder else "others"].append(name)
    return split


def add_adapter(network, name: str, modules: list[str], rank: int) -> None:
    """As the peers do it, then trained: PEFT starts with an update of zero."""
    network.add_adapter(LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=modules), adapter_name=name)
    for key, value in network.named_parameters():
        if ".lora_B." in key and f".{name}." in key:
            torch.nn.init.normal_(value, std=0.02)
        elif ".lora_A." in key and f".{name}." in key:
            torch.nn.init.normal_(value, std=0.05)


def osediff_checkpoint(base: Path) -> dict:
    """What OSEDiff saves, made by PEFT on real networks: the names are PEFT's own."""
    torch.manual_seed(3)
    unet, vae = load_unet(base), AutoencoderKL.from_pretrained(base / "vae")
    split, encoder = groups(targets(unet)), vae_targets(vae)
    for group, modules in split.items():
        add_adapter(unet, f"default_{group}", modules, RANK_UNET)
    add_adapter(vae, "default_encoder", encoder, RANK_VAE)
    with torch.no_grad():
        unet.conv_in.base_layer.weight += 0.05 * torch.randn_like(unet.conv_in.base_layer.weight)
        unet.conv_in.base_layer.bias += 0.05 * torch.randn_like(unet.conv_in.base_layer.bias)
    kept = {key: value for key, value in unet.state_dict().items() if "lora" in key or "conv_in" in key}
    return {
        "vae_lora_encoder_modules": [*encoder, *encoder[:3]],  # its loop lists some several times
        **{f"unet_lora_{group}_modules": modules for group, modules in split.items()},
        "rank_unet": RANK_UNET,
        "rank_vae": RANK_VAE,
        "state_dict_unet": kept,
        "state_dict_vae": {key: value for key, value in vae.state_dict().items() if "lora" in key},
    }


def pisasr_checkpoint(base: Path) -> dict:
    """What PiSA-SR saves: two sets of three adapters, nothing of the VAE."""
    torch.manual_seed(4)
    unet = load_unet(base)
    split = groups(targets(unet))
    ranks = {"pix": 4, "sem": 2}
    for purpose, rank in ranks.items():
        for group, modules in split.items():
            add_adapter(unet, f"default_{group}_{purpose}", modules, rank)
    return {
        **{f"unet_lora_{group}_modules_{purpose}": split[group] for purpose in ranks for group in split},
        **{f"lora_rank_unet_{purpose}": rank for purpose, rank in ranks.items()},
        "state_dict_unet": {key: value for key, value in unet.state_dict().items() if "lora" in key},
    }


@pytest.fixture(scope="module")
def osediff(base) -> dict:
    return osediff_checkpoint(base)


def updated(state: dict, lora: dict, adapters: dict[str, int]) -> dict:
    """float64: base + alpha / rank * B A for each adapter, written out here and not with the project's code."""
    result = {key: value.double() for key, value in state.items()}
    for key, down in lora.items():
        module, mark, rest = key.partition(".lora_A.")
        adapter = rest.removesuffix(".weight")
        if mark and adapter in adapters:
            up = lora[f"{module}.lora_B.{rest}"].double()
            product = torch.einsum("or,rx->ox", up.flatten(1), down.double().flatten(1))
            weight = result[f"{module}.weight"]
            result[f"{module}.weight"] = weight + PEFT_ALPHA / adapters[adapter] * product.reshape(weight.shape)
    return result


# OSEDiff


def test_every_kind_that_the_command_names_has_a_reader():
    assert {*PICKLED_KINDS, LORA_KIND} == set(IMPORT_KINDS)


def test_osediff_gives_the_latent_of_its_own_arithmetic(base, osediff, tmp_path):
    torch.save(osediff, tmp_path / "osediff.pkl")
    generator = import_checkpoint(
        "osediff", tmp_path / "osediff.pkl", tmp_path / "osediff.safetensors", ImportSettings(base=base)
    )
    info = generator.info
    assert (info.family, info.timestep, info.prediction, info.base_hash) == ("sd21", 999, "eps", open_base(base).hash())
    assert load_generator(tmp_path / "osediff.safetensors").prompt_embedding is None

    unet, vae = load_unet(base), AutoencoderKL.from_pretrained(base / "vae")
    kept = osediff["state_dict_unet"]
    state = {
        **unet.state_dict(),
        "conv_in.weight": kept["conv_in.base_layer.weight"],
        "conv_in.bias": kept["conv_in.base_layer.bias"],
    }
    adapters = {f"default_{group}": RANK_UNET for group in ("encoder", "decoder", "others")}
    unet.double().load_state_dict(updated(state, kept, adapters))
    vae.double().load_state_dict(updated(vae.state_dict(), osediff["state_dict_vae"], {"default_encoder": RANK_VAE}))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    prompt = open_base(base).prompt_embedding()[None]
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    with torch.inference_mode():
        z = vae.encode(image.double()).latent_dist.mode() * 0.18215
        eps = unet(z, torch.tensor(999), encoder_hidden_states=prompt.double()).sample
        expected = (z - (1 - alphas[999]).sqrt() * eps) / alphas[999].sqrt()
        backbone = load_backbone(Recipe(base, tmp_path / "osediff.safetensors"))
        latent = backbone.encode(image)
        output = backbone.predict_noise(latent, backbone.descriptor.timestep)
        got = NoiseSchedule().x0_from_output(backbone.descriptor.prediction, latent, output, 999)
        untouched = NoiseSchedule().x0_from_output(
            "eps", z, load_backbone(Recipe(base)).predict_noise(z, 999).double(), 999
        )
    scale = float(expected.abs().max())
    difference = float((got - expected).abs().max())
    print(f"largest difference {difference:.2e} at scale {scale:.2f}")
    assert difference <= 1e-4 * scale
    assert float((untouched - expected).abs().max()) > 0.01 * scale  # the LoRA does something


@pytest.mark.parametrize("zipped", [True, False])
def test_both_of_torchs_pickle_formats_keep_every_bit(base, osediff, tmp_path, zipped):
    torch.save(osediff, tmp_path / "osediff.pkl", _use_new_zipfile_serialization=zipped)
    import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", ImportSettings(base=base))
    unet = load_generator(tmp_path / "o.safetensors").unet
    kept = osediff["state_dict_unet"]
    assert torch.equal(unet.tensors["conv_in.weight"], kept["conv_in.base_layer.weight"])
    for module, pair in unet.lora.items():
        adapter = next(f"default_{group}" for group, modules in groups([module]).items() if modules)
        assert torch.equal(pair.down, kept[f"{module}.lora_A.{adapter}.weight"])
        assert torch.equal(pair.up, kept[f"{module}.lora_B.{adapter}.weight"])


def full_size_checkpoint() -> dict:
    """OSEDiff's layout at its published size, rank 1 to spare memory."""
    with init_empty_weights():
        networks = {
            "unet": UNet2DConditionModel.from_config(unet_config("sd21")),
            "vae": AutoencoderKL.from_config(vae_config()),
        }
    split = groups(targets(networks["unet"]))
    encoder = vae_targets(networks["vae"])
    states: dict[str, dict[str, torch.Tensor]] = {"unet": {}, "vae": {}}
    for part, group, modules in [*(("unet", *entry) for entry in split.items()), ("vae", "encoder", encoder)]:
        for name in modules:
            shape = networks[part].get_submodule(name).weight.shape
            states[part][f"{name}.lora_A.default_{group}.weight"] = torch.zeros(1, *shape[1:], dtype=torch.float16)
            up = torch.zeros(shape[0], 1, *[1] * (len(shape) - 2), dtype=torch.float16)
            states[part][f"{name}.lora_B.default_{group}.weight"] = up
    states["unet"]["conv_in.base_layer.weight"] = torch.zeros(320, 4, 3, 3, dtype=torch.float16)
    states["unet"]["conv_in.base_layer.bias"] = torch.zeros(320, dtype=torch.float16)
    return {
        "vae_lora_encoder_modules": encoder,
        **{f"unet_lora_{group}_modules": split[group] for group in split},
        "rank_unet": 1,
        "rank_vae": 1,
        "state_dict_unet": states["unet"],
        "state_dict_vae": states["vae"],
    }


def test_every_target_of_the_published_size_finds_its_place(tmp_path, capsys):
    torch.save(full_size_checkpoint(), tmp_path / "osediff.pkl")
    assert main(["import", "osediff", str(tmp_path / "osediff.pkl"), str(tmp_path / "o.safetensors")]) == 0
    assert "image tagger" in capsys.readouterr().out
    generator = load_generator(tmp_path / "o.safetensors")
    assert len(generator.unet.lora) == 258
    assert len(generator.vae.lora) == 32
    assert {pair.up.dtype for pair in generator.unet.lora.values()} == {torch.float16}
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(unet_config("sd21"))
        vae = AutoencoderKL.from_config(vae_config())
    assert len(merged_part(generator, "unet", unet.state_dict())) == 259  # conv_in's bias is the one more
    assert len(merged_part(generator, "vae", vae.state_dict())) == 32


@pytest.mark.parametrize("family", ["sd21", "sd15"])
def test_the_table_of_names_and_shapes_is_diffusers_own(family):
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(unet_config(family))
        vae = AutoencoderKL.from_config(vae_config())
    layout = published_layout(family)
    real = {key: tuple(value.shape) for key, value in unet.state_dict().items() if "norm" not in key}
    assert layout["unet"] == real
    ends = ("encoder.", "quant_conv.")
    real = {
        key: tuple(value.shape) for key, value in vae.state_dict().items() if "norm" not in key and key.startswith(ends)
    }
    assert layout["vae"] == real
    modules = [key.removesuffix(".weight") for key in layout["unet"] if key.endswith(".weight")]
    assert len({kohya_name(name) for name in modules}) == len(modules)  # no two share an underscored name


# What is refused


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle 2", "pickle 4"])
def test_a_pickle_with_code_is_refused_and_nothing_is_run(osediff, tmp_path, capsys, form):
    mark, source = tmp_path / "touched", tmp_path / "evil.pkl"
    evil = {**osediff, "rank_unet": HostileValue(mark)}
    if form.startswith("pickle"):
        source.write_bytes(pickle.dumps({"rank_unet": HostileValue(mark)}, protocol=int(form[-1])))
    else:
        torch.save(evil, source, _use_new_zipfile_serialization=form == "torch")
    assert_runs_code(source, mark)
    for kind in ("osediff", "pisasr"):
        assert main(["import", kind, str(source), str(tmp_path / "o.safetensors")]) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert "refused, and no code in it was run" in error
        assert "weights_only" not in error  # torch's advice to switch the protection off
    assert not mark.exists()
    assert not (tmp_path / "o.safetensors").exists()


def drop(state, key):
    return lambda checkpoint: checkpoint[state].pop(key)


def put(state, key, value):
    return lambda checkpoint: checkpoint[state].__setitem__(key, value)


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
UNET_A, VAE_B = f"{Q}.lora_A.default_encoder.weight", "encoder.conv_out.lora_B.default_encoder.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("state_dict_unet", UNET_A), f"missing tensor {UNET_A}"),
        (drop("state_dict_vae", VAE_B), f"missing tensor {VAE_B}"),
        (drop("state_dict_unet", "conv_in.base_layer.bias"), "missing tensor conv_in.base_layer.bias"),
        (put("state_dict_unet", UNET_A, torch.full((RANK_UNET, 32), math.nan)), f"NaN or infinite values in {UNET_A}"),
        (put("state_dict_unet", UNET_A, torch.zeros(3, 32)), f"{Q}.lora_A.default_encoder [3, 32]"),
        (put("state_dict_unet", UNET_A, torch.zeros(RANK_UNET, 33)), f"unet.{Q}.weight [32, 33] (the base has"),
        (put("state_dict_unet", "x.lora_A.other.weight", torch.zeros(1)), "unexpected tensors x.lora_A.other.weight"),
        (put("state_dict_unet", UNET_A, 3.0), f"these are not: {UNET_A}"),
        (lambda checkpoint: checkpoint.pop("state_dict_vae"), "missing entry state_dict_vae"),
        (lambda checkpoint: checkpoint.pop("rank_vae"), "missing entry rank_vae"),
        (lambda checkpoint: checkpoint.update(rank_unet=True), "rank_unet must be a whole number"),
        (lambda checkpoint: checkpoint.update(state_dict_vae=[]), "state_dict_vae must hold tensors by name"),
        (lambda checkpoint: checkpoint.update(rank_unet=3), "do not have the rank 3 that rank_unet states"),
        (lambda checkpoint: checkpoint.pop("unet_lora_others_modules"), "missing entry unet_lora_others_modules"),
        (lambda checkpoint: checkpoint.update(state_dict_unet_de_mlp={}), "S3Diff"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(base, osediff, tmp_path, damage, message):
    copy = {key: dict(value) if isinstance(value, dict) else value for key, value in osediff.items()}
    damage(copy)
    torch.save(copy, tmp_path / "osediff.pkl")
    with pytest.raises(IcmsrError) as caught:
        import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", ImportSettings(base=base))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "osediff.pkl"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint_is_refused(osediff, tmp_path, zipped):
    path = tmp_path / "osediff.pkl"
    torch.save(osediff, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(IcmsrError, match="truncated, damaged"):
        import_checkpoint("osediff", path, tmp_path / "o.safetensors")


def test_a_checkpoint_of_another_kind_size_or_family_is_refused(base, osediff, tmp_path):
    torch.save(osediff, tmp_path / "osediff.pkl")
    with pytest.raises(IcmsrError, match="as pisasr: missing entry lora_rank_unet_pix"):
        import_checkpoint("pisasr", tmp_path / "osediff.pkl", tmp_path / "o.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(IcmsrError, match="for a LoRA file use the kind lora"):
        import_checkpoint("osediff", tmp_path / "x.safetensors", tmp_path / "o.safetensors")
    with pytest.raises(IcmsrError, match=r"does not fit this base model: unet\.conv_in\.weight \[32, 4, 3, 3\]"):
        import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors")
    other = write_sd_folder(tmp_path / "sd15", "sd15", width_divisor=10)
    with pytest.raises(IcmsrError, match="this base is sd15, but the file is for sd21"):
        import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", ImportSettings(base=other))
    for settings in (ImportSettings(timestep=500), ImportSettings(prediction="v"), ImportSettings(family="sd15")):
        with pytest.raises(IcmsrError, match="of osediff is always"):
            import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", settings)


@pytest.mark.parametrize(
    ("dest", "message"), [("o.pkl", "ends in .safetensors"), ("a.safetensors", "source and result are the same file")]
)
def test_the_result_needs_a_name_of_its_own(tmp_path, dest, message):
    source = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, source)
    with pytest.raises(IcmsrError, match=message):
        import_checkpoint("lora", source, tmp_path / dest, ImportSettings(family="sd21"))


def test_a_failed_write_leaves_the_old_file(base, osediff, tmp_path, monkeypatch):
    torch.save(osediff, tmp_path / "osediff.pkl")
    (tmp_path / "o.safetensors").write_bytes(b"before")

    def fail(*arguments, **options):
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("icmsr_core.weights.tensor_files.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", ImportSettings(base=base))
    assert (tmp_path / "o.safetensors").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 2


# PiSA-SR


def test_pisasr_becomes_a_faithful_and_a_realistic_set(base, tmp_path):
    checkpoint = pisasr_checkpoint(base)
    torch.save(checkpoint, tmp_path / "pisa.pkl")
    import_checkpoint("pisasr", tmp_path / "pisa.pkl", tmp_path / "p.safetensors", ImportSettings(base=base))
    generator = load_generator(tmp_path / "p.safetensors")
    assert (generator.info.timestep, generator.info.prediction, generator.info.family) == (1, "residual", "sd21")
    assert (generator.info.rank, generator.info.realistic_rank) == (4, 2)
    assert not generator.vae
    state = load_unet(base).state_dict()
    pixels = {f"default_{group}_pix": 4 for group in ("encoder", "decoder", "others")}
    semantics = {f"default_{group}_sem": 2 for group in ("encoder", "decoder", "others")}
    for fidelity, adapters in ((0.0, pixels), (1.0, pixels | semantics)):
        expected = updated(state, checkpoint["state_dict_unet"], adapters)
        merged = merged_part(generator.at_fidelity(fidelity), "unet", state)
        assert len(merged) == len(targets(load_unet(base)))
        for key, value in merged.items():
            torch.testing.assert_close(value.double(), expected[key], atol=1e-6, rtol=1e-6)
            assert not torch.equal(value, state[key])


# LoRA files


@pytest.fixture(scope="module")
def trained(base) -> UNet2DConditionModel:
    """A UNet with a LoRA of rank 4 and alpha 6 by PEFT, on every standard target."""
    torch.manual_seed(6)
    unet = load_unet(base)
    patterns = {"rank_pattern": {"conv_in": 2}, "alpha_pattern": {"conv_out": 3}}
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets(unet), **patterns), adapter_name="default")
    for name, value in unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.02)
    return unet


def assert_merges_as(peft_unet: UNet2DConditionModel, base: Path, path: Path) -> None:
    """The generator file changes the base's weights as PEFT's own merge does."""
    merged = merged_part(load_generator(path), "unet", load_unet(base).state_dict())
    changed = 0
    for name, module in peft_unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            expected = module.base_layer.weight + module.get_delta_weight("default")
            torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)
            changed += 1
    assert changed == len(merged) == 258


def write_diffusers(unet, folder: Path) -> Path:
    StableDiffusionPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=plain(unet.peft_config["default"].to_dict())
    )
    return folder


def plain(config: dict) -> dict:
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def test_a_diffusers_lora_as_diffusers_writes_it(base, trained, tmp_path):
    source = write_diffusers(trained, tmp_path / "lora")
    settings = ImportSettings(base=base, timestep=250, prediction="v")
    import_checkpoint("lora", source, tmp_path / "l.safetensors", settings)
    assert_merges_as(trained, base, tmp_path / "l.safetensors")
    info = load_generator(tmp_path / "l.safetensors").info
    assert (info.timestep, info.prediction, info.rank, info.alpha, info.family) == (250, "v", 4, 6, "sd21")
    trained.save_lora_adapter(tmp_path / "unprefixed", adapter_name="default", upcast_before_saving=False)
    import_checkpoint("lora", tmp_path / "unprefixed", tmp_path / "u.safetensors", settings)
    assert read_tensors(tmp_path / "u.safetensors")[0].keys() == read_tensors(tmp_path / "l.safetensors")[0].keys()
    assert_merges_as(trained, base, tmp_path / "u.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_as_peft_writes_it(base, tmp_path, rslora):
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "conv1"], use_rslora=rslora, init_lora_weights=False)
    wrapped = get_peft_model(load_unet(base), config)
    wrapped.save_pretrained(tmp_path / "peft")
    state = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in state)
    import_checkpoint("lora", tmp_path / "peft", tmp_path / "l.safetensors", ImportSettings(base=base))
    merged = merged_part(load_generator(tmp_path / "l.safetensors"), "unet", load_unet(base).state_dict())
    deltas = {
        name: module.base_layer.weight + module.get_delta_weight("default")
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(deltas) == len(merged)
    for name, expected in deltas.items():
        torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)
    (tmp_path / "peft/adapter_config.json").unlink()
    with pytest.raises(IcmsrError, match=r"adapter_config.json: missing, and .* needs it for its alpha"):
        import_checkpoint("lora", tmp_path / "peft", tmp_path / "l.safetensors", ImportSettings(base=base))


def kohya_tensors(base: Path, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """kohya's layout: attention of rank 4, convolutions of rank 2 with an alpha of their own."""
    random = torch.Generator().manual_seed(8)
    unet, tensors = load_unet(base), {}
    for name in targets(unet):
        weight = unet.get_submodule(name).weight
        rank = 4 if weight.ndim == 2 else 2
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=random) * 0.05
        ones = [1] * (weight.ndim - 2)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(weight.shape[0], rank, *ones, generator=random) * 0.05
        tensors[f"{stem}.alpha"] = torch.tensor(alpha if rank == 4 else 3.0)
    return tensors


def test_a_kohya_file_scales_each_lora_by_its_own_alpha(base, tmp_path):
    tensors = kohya_tensors(base)
    save_file(tensors, tmp_path / "kohya.safetensors")
    import_checkpoint("lora", tmp_path / "kohya.safetensors", tmp_path / "l.safetensors", ImportSettings(base=base))
    unet = load_unet(base)
    merged = merged_part(load_generator(tmp_path / "l.safetensors"), "unet", unet.state_dict())
    assert len(merged) == 258
    for name in targets(unet):
        stem, weight = "lora_unet_" + name.replace(".", "_"), unet.get_submodule(name).weight
        down, up = tensors[f"{stem}.lora_down.weight"].double(), tensors[f"{stem}.lora_up.weight"].double()
        scale = float(tensors[f"{stem}.alpha"]) / down.shape[0]
        expected = weight.double() + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, atol=1e-6, rtol=1e-6)


def test_one_pixel_convolutions_and_linear_layers_are_taken_in_either_form(tmp_path):
    """SD1.5's proj_in is a convolution; trainers also write it as a linear layer, and linear layers as convolutions."""
    other = write_sd_folder(tmp_path / "sd15", "sd15", width_divisor=10)
    block = "lora_unet_down_blocks_0_attentions_0"
    shapes = {f"{block}_proj_in": (32, 32), f"{block}_transformer_blocks_0_attn1_to_q": (32, 32, 1, 1)}
    tensors = {}
    for stem, (out, into, *ones) in shapes.items():
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = (
            torch.randn(2, into, *ones),
            torch.randn(out, 2, *ones),
        )
    save_file(tensors, tmp_path / "kohya.safetensors")
    import_checkpoint("lora", tmp_path / "kohya.safetensors", tmp_path / "l.safetensors", ImportSettings(base=other))
    generator = load_generator(tmp_path / "l.safetensors")
    assert generator.info.family == "sd15"
    merged = merged_part(generator, "unet", open_base(other).unet_state())
    assert {key.rsplit(".", 2)[1]: value.ndim for key, value in merged.items()} == {"proj_in": 4, "to_q": 2}


def test_the_key_styles_lead_to_the_same_module():
    module, out = f"{Q[:-5]}.to_q", f"{Q[:-5]}.to_out.0"
    styles = {
        f"base_model.model.{module}.lora_A.weight": (module, "down"),
        f"base_model.model.{module}.lora_B.default.weight": (module, "up"),
        f"unet.{module}.lora_A.weight": (module, "down"),
        f"unet.{module}.lora.up.weight": (module, "up"),
        f"{module}.lora_linear_layer.down.weight": (module, "down"),
        f"unet.{Q[:-5]}.processor.to_out_lora.up.weight": (out, "up"),
        f"unet.{Q[:-5]}.to_out.0.lora_B.weight": (out, "up"),
        f"{kohya_name(out)}.lora_down.weight": (out, "down"),
        f"{kohya_name(module)}.alpha": (module, "alpha"),
    }
    assert lora_keys(styles, [module, out]) == (styles, [])


def rename(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


K = kohya_name(Q)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename(f"{K}.lora_up.weight", f"{K}x.lora_up.weight"), f"the UNet has no layer for {K}x.lora_up.weight"),
        (lambda tensors: tensors.pop(f"{K}.lora_up.weight"), f"{Q} has no up matrix"),
        (lambda tensors: tensors.pop(f"{K}.lora_down.weight"), f"{Q} has no down matrix"),
        (lambda tensors: tensors.update({"lora_te_text_model_x.alpha": torch.ones(())}), "holds no text encoder"),
        (lambda tensors: tensors.update({f"{K}.lora_mid.weight": torch.ones(1)}), f"{K}.lora_mid.weight"),
        (lambda tensors: tensors.update({f"{K}.dora_scale": torch.ones(1)}), f"{K}.dora_scale"),
        (lambda tensors: tensors[f"{K}.lora_up.weight"].fill_(math.inf), f"infinite values in {K}.lora_up.weight"),
        (lambda tensors: tensors.update({f"{K}.alpha": torch.zeros(())}), f"alpha of {Q} must be one positive"),
        (lambda tensors: tensors.update({f"{K}.alpha": torch.ones(2)}), f"alpha of {Q} must be one positive"),
        (lambda tensors: tensors.update({f"unet.{Q}.lora_A.weight": torch.ones(4, 32)}), "are both the down matrix"),
        (lambda tensors: tensors.update({f"{K}.lora_up.weight": torch.ones(32, 3)}), "are not a LoRA pair"),
        (lambda tensors: tensors.update({f"{K}.lora_up.weight": torch.ones(31, 4)}), f"unet.{Q}.weight [31, 32]"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_a_damaged_lora_is_refused_by_name(base, tmp_path, damage, message):
    tensors = kohya_tensors(base)
    damage(tensors)
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(IcmsrError) as caught:
        import_checkpoint("lora", tmp_path / "kohya.safetensors", tmp_path / "l.safetensors", ImportSettings(base=base))
    assert message in str(caught.value)
    assert not (tmp_path / "l.safetensors").exists()


def test_a_truncated_lora_another_family_and_a_missing_family_are_refused(base, tmp_path, capsys):
    source, dest = tmp_path / "kohya.safetensors", tmp_path / "l.safetensors"
    save_file(kohya_tensors(base), source)
    with pytest.raises(IcmsrError, match="give --family"):
        import_checkpoint("lora", source, dest)
    assert main(["import", "lora", str(source), str(dest), "--family", "sd15"]) == 1
    assert "does not fit this base model: unet." in capsys.readouterr().err
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(IcmsrError, match=r"not a readable \.safetensors"):
        import_checkpoint("lora", source, dest, ImportSettings(base=base))
    with pytest.raises(IcmsrError, match="timestep"):
        import_checkpoint("lora", source, dest, ImportSettings(base=base, timestep=1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet.use_dora": True}, "use_dora must be False, got True"),
        ({"unet.r": 8}, "its configuration says 8"),
        ({"unet.lora_alpha": None}, "r and lora_alpha must be positive"),
        ({"unet.alpha_pattern": {"conv_out": -1}}, "alpha of conv_out must be a positive"),
        ({"unet.alpha_pattern": {"(": 1}}, "is not a regular expression"),
    ],
)
def test_a_configuration_that_cannot_be_kept_is_refused(base, trained, tmp_path, change, message):
    path = write_diffusers(trained, tmp_path / "lora") / "pytorch_lora_weights.safetensors"
    tensors, metadata = read_tensors(path)
    config = {**json.loads(metadata["lora_adapter_metadata"]), **change}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(IcmsrError, match=message):
        import_checkpoint("lora", path, tmp_path / "l.safetensors", ImportSettings(base=base))


# Export


@pytest.fixture(scope="module")
def generator_file(base, trained, tmp_path_factory) -> Path:
    """A generator with LoRA alone, of two ranks, alpha 6 everywhere."""
    folder = tmp_path_factory.mktemp("generator")
    path = folder / "generator.safetensors"
    import_checkpoint("lora", write_diffusers(trained, folder / "lora"), path, ImportSettings(base=base))
    return path


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_generator_comes_back_exactly(base, generator_file, tmp_path, form, dtype):
    first = tmp_path / "first.safetensors"
    save_generator(first, load_generator(generator_file), dtype)
    there = tmp_path / ("there" if form == "diffusers" else "there.safetensors")
    assert export_generator(form, first, there).modules == 258
    import_checkpoint("lora", there, tmp_path / "back.safetensors", ImportSettings(base=base))
    before, after = load_generator(first), load_generator(tmp_path / "back.safetensors")
    assert (after.info.rank, after.info.alpha) == (before.info.rank, before.info.alpha)
    assert after.unet.lora.keys() == before.unet.lora.keys()
    for module, pair in before.unet.lora.items():
        assert all(torch.equal(got, sent) for got, sent in zip(after.unet.lora[module], pair))
        assert after.unet.lora[module].up.dtype == dtype


def test_diffusers_loads_the_folder_with_its_alpha(base, generator_file, tmp_path):
    export_generator("diffusers", generator_file, tmp_path / "lora")
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(tmp_path / "lora", return_lora_metadata=True)
    unet = load_unet(base)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name="default", metadata=metadata)
    assert_merges_as(unet, base, generator_file)


def test_two_sets_are_exported_as_one_lora(tmp_path, capsys):
    from icmsr_core.weights.embedded import embedded_base

    generator = random_generator(embedded_base(), two_sets=True)
    save_generator(tmp_path / "g.safetensors", generator, torch.float32)
    arguments = ["export", "comfyui", str(tmp_path / "g.safetensors"), str(tmp_path / "l.safetensors")]
    assert main([*arguments, "--fidelity", "0.5"]) == 0
    out = capsys.readouterr().out
    for lost in ("timestep", "conv_in.weight", "VAE's LoRA", "prompt embedding"):
        assert lost in out.splitlines()[1]
    tensors = load_file(tmp_path / "l.safetensors")
    modules = dict.fromkeys([*generator.unet.lora, *generator.realistic["unet"].lora])
    assert len(tensors) == 3 * len(modules)
    for module in modules:
        expected = 0
        for pair, alpha in (
            (generator.unet.lora.get(module), generator.info.alpha),
            (generator.realistic["unet"].lora.get(module), 0.5 * generator.info.realistic_alpha),
        ):
            if pair is not None:
                expected = expected + alpha / pair.down.shape[0] * pair.up.flatten(1) @ pair.down.flatten(1)
        stem = kohya_name(module)
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        scale = tensors[f"{stem}.alpha"] / down.shape[0]
        torch.testing.assert_close(scale * up.flatten(1) @ down.flatten(1), expected, atol=1e-6, rtol=1e-5)
    assert main(arguments) == 0  # fidelity 1 unless told
    assert main([*arguments, "--fidelity", "0"]) == 0
    assert len(load_file(tmp_path / "l.safetensors")) == 3 * len(generator.unet.lora)


def test_what_cannot_be_exported_is_refused(generator_file, tmp_path):
    from icmsr_core.weights.embedded import embedded_base

    with pytest.raises(IcmsrError, match="fidelity needs a generator with"):
        export_generator("diffusers", generator_file, tmp_path / "lora", fidelity=0.5)
    with pytest.raises(IcmsrError, match="is a file, but diffusers stores a LoRA as a folder"):
        export_generator("diffusers", generator_file, generator_file)
    with pytest.raises(IcmsrError, match="format must be one of diffusers, comfyui"):
        export_generator("kohya", generator_file, tmp_path / "l.safetensors")
    generator = random_generator(embedded_base())
    whole = type(generator)(generator.info, type(generator.unet)({}, generator.unet.tensors), generator.vae)
    save_generator(tmp_path / "whole.safetensors", whole)
    with pytest.raises(IcmsrError, match="has no LoRA for the UNet"):
        export_generator("comfyui", tmp_path / "whole.safetensors", tmp_path / "l.safetensors")


def test_notes_stand_in_the_description_only_where_there_are_some(generator_file, tmp_path):
    assert "holds no prompt: bring one" in load_generator(generator_file).info.notes
    from icmsr_core.weights.embedded import embedded_generator

    save_generator(tmp_path / "g.safetensors", load_generator(embedded_generator()))
    assert "notes" not in json.loads(read_tensors(tmp_path / "g.safetensors")[1]["icmsr"])


CORE_SCRIPT = """
import sys, json, logging
sys.path.insert(0, sys.argv[1]); path = sys.argv[2]; sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.lora, comfy.model_base, comfy.supported_models, comfy.utils
config = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
          "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
          "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1, "use_linear_in_transformer": True,
          "context_dim": 1024, "num_head_channels": 64, "adm_in_channels": None, "use_temporal_attention": False,
          "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]}
known = comfy.supported_models.SD20(config)
known.set_inference_dtype(torch.float32, None)
model = comfy.model_base.BaseModel(known, device=torch.device("meta"))
lora = comfy.utils.load_torch_file(path, safe_load=True)
patches = comfy.lora.load_lora(lora, comfy.lora.model_lora_keys_unet(model, {}), log_missing=False)
state = model.state_dict()
rows = {}
for key, adapter in patches.items():
    up, down, alpha = adapter.weights[:3]
    assert up.shape[0] == state[key].shape[0] and down.shape[1:] == state[key].shape[1:], key
    rows[key] = alpha
values = {}
for key in ("input_blocks.0.0.weight", "output_blocks.3.1.proj_in.weight"):
    key = f"diffusion_model.{key}"
    start = torch.zeros(state[key].shape)
    values[key] = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], start, key).sum().item()
loaded = set().union(*(adapter.loaded_keys for adapter in patches.values()))
alphas = {key for key in lora if key.endswith(".alpha")}
print(json.dumps({"modules": len(patches), "alphas": sorted(set(rows.values())),
                  "left": sorted(set(lora) - loaded - alphas)[:5], "values": values}))
"""


@pytest.mark.comfy
def test_comfyui_cores_own_loader_takes_every_module(comfyui, comfy_python, tmp_path):
    checkpoint = full_size_checkpoint()
    state = checkpoint["state_dict_unet"]
    for module, adapter in (("conv_in", "default_encoder"), ("up_blocks.1.attentions.0.proj_in", "default_decoder")):
        state[f"{module}.lora_A.{adapter}.weight"].fill_(0.5)
        state[f"{module}.lora_B.{adapter}.weight"].fill_(0.25)
    torch.save(checkpoint, tmp_path / "osediff.pkl")
    import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors")
    exported = export_generator("comfyui", tmp_path / "o.safetensors", tmp_path / "l.safetensors")
    assert exported.modules == 258
    arguments = [comfy_python, "-c", CORE_SCRIPT, comfyui, exported.path]
    run = subprocess.run([str(entry) for entry in arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    sums = report.pop("values")
    assert report == {"modules": 258, "alphas": [8.0], "left": []}
    expected = [PEFT_ALPHA * 0.5 * 0.25 * 320 * 4 * 9, PEFT_ALPHA * 0.5 * 0.25 * 1280 * 1280]  # rank 1
    assert list(sums.values()) == pytest.approx(expected)
