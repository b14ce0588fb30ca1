"""HYPIR's and OMGSR-S's published layouts become generators: every module in its place, with its own scale."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.foreign.conversion import load_any_generator
from icmsr_core.foreign.layouts import published_layout
from icmsr_core.foreign.recognition import omgsr_folder
from icmsr_core.foreign.told import Told
from icmsr_core.weights.embedded import embedded_generator
from icmsr_core.weights.generator_file import load_generator
from tests.support.foreign_files import HYPIR_TARGETS, OMGSR_TARGETS, Q, hypir_checkpoint, shapes_ending, write_omgsr
from tests.support.merging import merged_part

NOTHING = Told()


@pytest.fixture(scope="module")
def hypir(shapes) -> dict[str, torch.Tensor]:
    return hypir_checkpoint(shapes["unet"])


def test_hypir_becomes_a_generator_of_257_modules_with_its_licence(base, hypir, tmp_path, capsys):
    torch.save(hypir, tmp_path / "HYPIR_sd2.pth")
    dest = tmp_path / "hypir.safetensors"
    arguments = ["import", "hypir", str(tmp_path / "HYPIR_sd2.pth"), str(dest), "--base", str(base), "--half"]
    assert main([*arguments, "--coeff-t", "100"]) == 0
    shown = capsys.readouterr().out
    assert "LoRA on 257 modules" in shown
    assert "non-commercial" in shown
    assert "coeff_t 100" in shown
    generator = load_generator(dest)
    info = generator.info
    assert (info.family, info.timestep, info.prediction, info.coeff_t) == ("sd21", 200, "eps", 100)
    assert (info.rank, info.alpha, info.licence, len(generator.unet.lora)) == (256, 256, "non-commercial", 257)
    assert not generator.vae
    assert not generator.unet.tensors
    assert not generator.has_two_sets
    assert "must not be passed on" in info.notes
    assert {pair.up.dtype for pair in generator.unet.lora.values()} == {torch.float16}
    assert dest.stat().st_size < 0.6 * (tmp_path / "HYPIR_sd2.pth").stat().st_size
    assert {f"{module}.lora_A.default.weight" for module in generator.unet.lora} == {
        key for key in hypir if ".lora_A." in key
    }


def test_hypir_s_updates_have_the_scale_one(narrow, hypir, tmp_path):
    """alpha = rank = 256: W + B A."""
    torch.save(hypir, tmp_path / "h.pth")
    generator, found = load_any_generator(tmp_path / "h.pth", NOTHING, layouts=layouts_of(narrow))
    assert found == (
        "found HYPIR: rank 256 on 257 modules of the UNet; sd21, eps at timestep 200; licence: non-commercial"
    )
    state = narrow.unet_state()
    merged = merged_part(generator, "unet", state)
    assert len(merged) == 257
    for key, value in merged.items():
        down, up = (hypir[key.replace(".weight", f".lora_{half}.default.weight")].double() for half in "AB")
        expected = state[key].double() + (up.flatten(1) @ down.flatten(1)).reshape(state[key].shape)
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)


def layouts_of(base):
    return {"sd21": {part: base.shapes(part) for part in ("unet", "vae")}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [state.pop(f"{Q}.lora_{half}.default.weight") for half in "AB"], f"this file lacks {Q}: "),
        (lambda state: state.pop(f"{Q}.lora_B.default.weight"), f"{Q} has no up matrix"),
        (lambda state: state.update({key: value[:16] for key, value in state.items() if ".lora_A." in key}), "pair"),
        (lambda state: state.__setitem__(f"{Q}.lora_A.default.weight", torch.full((256, 32), torch.nan)), "NaN"),
        (
            lambda state: state.update(
                {f"time_embedding.linear_1.lora_{h}.default.weight": torch.ones(256, 256) for h in "AB"}
            ),
            "has besides time_embedding.linear_1: ",
        ),
    ],
)
def test_a_damaged_hypir_is_refused_by_name(narrow, hypir, tmp_path, change, message):
    state = dict(hypir)
    change(state)
    torch.save(state, tmp_path / "h.pth")
    with pytest.raises(IcmsrError) as caught:
        load_any_generator(tmp_path / "h.pth", NOTHING, layouts=layouts_of(narrow))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hypir_of_another_rank_is_refused_and_so_are_other_values_than_its_own(narrow, shapes, hypir, tmp_path):
    torch.save(hypir_checkpoint(shapes["unet"], rank=16), tmp_path / "small.pth")
    with pytest.raises(IcmsrError, match=r"recognised as HYPIR, whose LoRA has the rank 256 in the unet; .* has 16"):
        load_any_generator(tmp_path / "small.pth", NOTHING, layouts=layouts_of(narrow))
    torch.save(hypir, tmp_path / "h.pth")
    for told, words in ((Told(timestep=999), "timestep of hypir is always 200, got 999"), (Told("sd15"), "family")):
        with pytest.raises(IcmsrError, match=rf"h\.pth.*{words}"):
            load_any_generator(tmp_path / "h.pth", told, layouts=layouts_of(narrow))
    with pytest.raises(IcmsrError, match=r"the family of .*generator\.safetensors is always nano, got sd21"):
        load_any_generator(embedded_generator(), Told("sd21"))
    with pytest.raises(IcmsrError, match="timestep must be between 0 and 999, got 1000"):
        load_any_generator(tmp_path / "h.pth", Told(coeff_t=1000), layouts=layouts_of(narrow))
    assert (
        load_any_generator(tmp_path / "h.pth", Told("sd21", 200, "eps", 50), layouts=layouts_of(narrow))[0].info.coeff_t
        == 50
    )


def test_the_published_sizes_are_those_that_the_authors_count():
    """257 modules with 259,474,432 numbers at rank 256; OMGSR-S 194 and 31 modules."""
    layout = published_layout("sd21")
    hypir = shapes_ending(layout["unet"], HYPIR_TARGETS)
    count = sum(256 * (shape[0] + torch.Size(shape[1:]).numel()) for shape in hypir.values())
    assert (len(hypir), count) == (257, 259_474_432)
    assert len(shapes_ending(layout["unet"], OMGSR_TARGETS)) == 194
    encoder = {key: shape for key, shape in layout["vae"].items() if key.startswith("encoder.")}
    assert len(shapes_ending(encoder, OMGSR_TARGETS)) == 31


def test_omgsr_is_two_folders_whose_scales_are_kept_with_one_alpha(narrow, shapes, tmp_path):
    folder = write_omgsr(tmp_path / "omgsr", **shapes)
    dest = tmp_path / "o.safetensors"
    import_checkpoint("omgsr", folder, dest, ImportSettings(base=narrow.path))
    generator = load_generator(dest)
    info = generator.info
    assert (info.timestep, info.prediction, info.rank, info.alpha) == (273, "eps", 32, 32)
    unet_count = len(shapes_ending(shapes["unet"], OMGSR_TARGETS))
    assert len(generator.unet.lora) == unet_count == 194
    for part, name, prefix, state in (
        ("unet", "unet", "", narrow.unet_state()),
        ("vae", "vae_encoder", "encoder.", narrow.vae_state()),
    ):
        own = load_file(folder / f"{name}_lora_adapter/adapter_model.safetensors")
        merged = merged_part(generator, part, state)
        assert 2 * len(merged) == len(own)
        for key, value in merged.items():
            stem = f"base_model.model.{key.removeprefix(prefix).removesuffix('.weight')}"
            down, up = (own[f"{stem}.lora_{half}.weight"].double() for half in "AB")
            update = (up.flatten(1) @ down.flatten(1)).reshape(state[key].shape)  # alpha = rank in both
            torch.testing.assert_close(value.double(), state[key].double() + update, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chosen", ["", "unet_lora_adapter", "vae_encoder_lora_adapter/adapter_model.safetensors"])
def test_omgsr_is_found_from_any_place_in_it(narrow, shapes, tmp_path, chosen):
    folder = write_omgsr(tmp_path / "omgsr", **shapes)
    generator, found = load_any_generator(folder / chosen, NOTHING, layouts=layouts_of(narrow))
    assert "found OMGSR-S: rank 32 on 194 modules of the UNet, rank 16 on 29 modules of the VAE" in found
    assert generator.info.recommended["color_fix"] == "adain"
    assert omgsr_folder(folder / "another.pth") is None  # a file beside the two folders


def test_half_of_omgsr_is_refused(narrow, shapes, tmp_path):
    folder = write_omgsr(tmp_path / "omgsr", **shapes)
    path = folder / "vae_encoder_lora_adapter/adapter_model.safetensors"
    state = load_file(path)
    state.pop("base_model.model.conv_out.lora_A.weight"), state.pop("base_model.model.conv_out.lora_B.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(IcmsrError, match=r"modules of the vae; this file lacks encoder\.conv_out"):
        load_any_generator(folder, NOTHING, layouts=layouts_of(narrow))
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    with pytest.raises(IcmsrError, match="vae_encoder_lora_adapter must lie next to it: download both"):
        load_any_generator(folder / "unet_lora_adapter", NOTHING, layouts=layouts_of(narrow))


def test_a_timestep_of_the_closed_form_is_kept_by_the_file_and_refused_where_it_does_nothing(hypir, tmp_path, base):
    torch.save(hypir, tmp_path / "h.pth")
    import_checkpoint("hypir", tmp_path / "h.pth", tmp_path / "h.safetensors", ImportSettings(Told(coeff_t=80), base))
    info = load_generator(tmp_path / "h.safetensors").info
    assert (info.coeff_t, info.format_version) == (80, 3)  # a version that knows no coeff_t refuses the file
    generator, found = load_any_generator(tmp_path / "h.safetensors", Told(coeff_t=30))
    assert (generator.info.coeff_t, found) == (30, "")
    with pytest.raises(IcmsrError, match="coeff_t has no effect on a generator that predicts the residual"):
        import_checkpoint("pisasr", tmp_path / "h.pth", tmp_path / "p.safetensors", ImportSettings(Told(coeff_t=80)))
