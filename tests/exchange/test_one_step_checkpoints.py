"""OSEDiff and PiSA-SR checkpoints become generator files: exact layouts, random tensors, their own arithmetic."""

import math
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from icmsr_core.backbone.noise_schedule import NoiseSchedule
from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.foreign.kinds import IMPORT_KINDS, LORA_KIND
from icmsr_core.foreign.layouts import kohya_name, published_layout
from icmsr_core.foreign.relatives import RELATIVE
from icmsr_core.foreign.told import Told
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import load_generator
from tests.support.foreign_files import (
    PEFT_ALPHA,
    RANK_UNET,
    RANK_VAE,
    Q,
    full_size_checkpoint,
    groups,
    load_unet,
    pisasr_checkpoint,
    targets,
)
from tests.support.hostile_pickle import HostileValue, assert_runs_code
from tests.support.merging import merged_part
from tests.support.sd_files import unet_config, vae_config, write_sd_folder

# The peers' own use of PEFT, several adapters on one network, is what it warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


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


def test_every_kind_that_the_command_names_has_a_reader():
    assert {*RELATIVE, LORA_KIND} == set(IMPORT_KINDS)


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
    with pytest.raises(
        IcmsrError, match=r"whose LoRA is on 32 modules of the vae; this file lacks encoder\.down_blocks\.1"
    ):
        import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors")
    other = write_sd_folder(tmp_path / "sd15", "sd15", width_divisor=10)
    with pytest.raises(IcmsrError, match="this base is sd15, but the file is for sd21"):
        import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", ImportSettings(base=other))
    for settings in (ImportSettings(told) for told in (Told(timestep=500), Told(prediction="v"), Told("sd15"))):
        with pytest.raises(IcmsrError, match="of osediff is always"):
            import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", settings)


@pytest.mark.parametrize(
    ("dest", "message"), [("o.pkl", "ends in .safetensors"), ("a.safetensors", "source and result are the same file")]
)
def test_the_result_needs_a_name_of_its_own(tmp_path, dest, message):
    source = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, source)
    with pytest.raises(IcmsrError, match=message):
        import_checkpoint("lora", source, tmp_path / dest, ImportSettings(Told("sd21")))


def test_a_failed_write_leaves_the_old_file(base, osediff, tmp_path, monkeypatch):
    torch.save(osediff, tmp_path / "osediff.pkl")
    (tmp_path / "o.safetensors").write_bytes(b"before")

    def fail(*arguments, **options):
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("icmsr_core.weights.tensor_files.save_file", fail)
    with pytest.raises(IcmsrError, match=r"o\.safetensors: cannot be written \(no space left on device\): it needs"):
        import_checkpoint("osediff", tmp_path / "osediff.pkl", tmp_path / "o.safetensors", ImportSettings(base=base))
    assert (tmp_path / "o.safetensors").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 2


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
