"""Base folders of this project: what they say of themselves, and every rejection."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import load_backbone
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.weights.base import BaseInfo, open_base, write_base_info
from tests.support.generators import TINY
from tests.support.model_files import write_base


@pytest.fixture
def own_base(tmp_path) -> Path:
    """A base folder that a test may spoil."""
    return write_base(tmp_path / "base", TINY)


def test_base_folder_describes_itself(own_base: Path) -> None:
    folder = open_base(own_base)
    assert folder.info == BaseInfo("random", "nano", licence="CC0-1.0")
    assert folder.schedule.alphas_cumprod[-1].sqrt().item() == pytest.approx(0.06826, abs=1e-5)
    weights = (own_base / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert folder.hash() == hashlib.sha256(weights).hexdigest()
    assert folder.prompt_embedding().shape == (1, 32)
    bare = folder.descriptor()
    assert (bare.family, bare.latent_channels, bare.latent_factor, bare.multiple_of) == ("nano", 4, 2, 4)
    assert (bare.timestep, bare.prediction) == (0, "eps")
    info = BaseInfo("other", "sd15", "v", 0.001, 0.02, 500, "MIT")
    write_base_info(own_base, info)
    assert open_base(own_base).info == info
    assert len(open_base(own_base).schedule.alphas_cumprod) == 500


def test_the_bare_prior_loads_without_a_generator(own_base: Path) -> None:
    backbone = load_backbone(Recipe(own_base))
    state = open_base(own_base).unet_state()
    assert all(torch.equal(value, state[key]) for key, value in backbone.unet.state_dict().items())
    (own_base / "prompt_embedding.safetensors").unlink()
    with pytest.raises(IcmsrError, match=r"neither the generator nor the base .* holds a prompt embedding"):
        load_backbone(Recipe(own_base))


@pytest.mark.parametrize(
    "missing",
    [
        "icmsr_base.json",
        "unet/config.json",
        "vae/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_missing_files_of_a_base_are_named(own_base: Path, missing: str) -> None:
    (own_base / missing).unlink()
    with pytest.raises(IcmsrError, match=f"not a base folder of ICM-SR, {missing} is missing"):
        open_base(own_base)


def test_what_is_not_a_base_is_refused(tmp_path) -> None:
    with pytest.raises(IcmsrError, match="nothing: no such file or folder"):
        open_base(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(IcmsrError, match="file: neither a base folder nor a"):
        open_base(tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("icmsr_base.json", "{", r"icmsr_base\.json: the file cannot be read as JSON"),
        ("icmsr_base.json", "[]", r"icmsr_base\.json: the file must be a JSON object, got list"),
        ("icmsr_base.json", b"\xff\xfe\x00", r"icmsr_base\.json: the file cannot be read as JSON"),
        ("icmsr_base.json", '{"name": "x"}', r"icmsr_base\.json: .*'family'"),
        ("icmsr_base.json", '{"name": "x", "family": 3}', r"icmsr_base\.json: family .* must be a str, got 3"),
        ("icmsr_base.json", '{"name": "x", "family": "y", "steps": "9"}', "steps .* must be a int, got '9'"),
        ("icmsr_base.json", '{"name": "x", "family": "y", "prediction": "z"}', "eps, v, residual, got 'z'"),
        ("unet/config.json", "no json", r"unet/config\.json: the file cannot be read as JSON"),
        ("vae/config.json", "{}", r"vae/config\.json: block_out_channels, latent_channels missing"),
        ("unet/config.json", '{"block_out_channels": [32]}', r"unet/config\.json: cross_attention_dim missing"),
        (
            "icmsr_base.json",
            '{"name": "x", "family": "y", "beta_end": 3}',
            r"base: betas must satisfy 0 < start <= end < 1, got 0\.00085 and 3",
        ),
        ("unet/config.json", "[" * 5000, r"unet/config\.json: the file cannot be read as JSON"),
        (
            "unet/config.json",
            '{"block_out_channels": 32, "cross_attention_dim": 8}',
            r"unet/config\.json: block_out_channels must be a list of positive whole numbers, got 32",
        ),
        (
            "vae/config.json",
            '{"block_out_channels": [32], "latent_channels": NaN}',
            r"vae/config\.json: latent_channels must be a positive whole number, got nan",
        ),
        (
            "vae/config.json",
            '{"block_out_channels": [32], "latent_channels": 4, "scaling_factor": "0.2"}',
            r"vae/config\.json: scaling_factor must be a positive number, got '0\.2'",
        ),
    ],
)
def test_damaged_descriptions_of_a_base_are_refused(own_base: Path, file: str, content: str | bytes, text: str) -> None:
    (own_base / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(IcmsrError, match=text):
        open_base(own_base)


def test_a_configuration_that_makes_no_network_is_named(own_base: Path) -> None:
    values = json.loads((own_base / "vae/config.json").read_text("utf-8"))
    (own_base / "vae/config.json").write_text(json.dumps({**values, "down_block_types": [0]}), "utf-8")
    with pytest.raises(IcmsrError, match=r"base/vae: no network can be built from its configuration \("):
        load_backbone(Recipe(own_base))


def test_the_number_of_heads_is_read_under_its_other_name(own_base: Path) -> None:
    """diffusers itself refuses `num_attention_heads`, which means the same as its `attention_head_dim`."""
    file = own_base / "unet/config.json"
    values = json.loads(file.read_text("utf-8"))
    heads = values.pop("attention_head_dim")
    file.write_text(json.dumps({**values, "num_attention_heads": heads}), "utf-8")
    assert load_backbone(Recipe(own_base)).unet.config.attention_head_dim == heads


def test_weights_that_do_not_fit_their_configuration_are_refused(own_base: Path) -> None:
    path = own_base / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if key != "decoder.conv_in.bias"}, path)
    with pytest.raises(IcmsrError, match=r"base/vae: the weights do not fit .*decoder\.conv_in\.bias"):
        load_backbone(Recipe(own_base))
    path.write_bytes(b"text")
    with pytest.raises(IcmsrError, match=r"not a readable \.safetensors"):
        load_backbone(Recipe(own_base))


def test_a_prompt_file_without_the_embedding_is_refused(own_base: Path) -> None:
    for content in ({"other": torch.ones(1, 32)}, {"prompt_embedding": torch.ones(32)}):
        save_file(content, own_base / "prompt_embedding.safetensors")
        with pytest.raises(IcmsrError, match=r"must hold the tensor prompt_embedding \[tokens, width\]"):
            open_base(own_base).prompt_embedding()
