"""The empty prompt's embedding from a text encoder inside a checkpoint, against transformers on the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.checkpoint_text import embed_empty_prompt
from tests.support.sd_files import clip_h_state, random_tensor

WIDTH, LAYERS = 128, 3
PADDING = {"sd15": 49407, "sd21": 0}


def encoder(act: str, layers: int) -> CLIPTextModel:
    """transformers' network with two heads of 64 channels."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // 64,
        max_position_embeddings=77,
        hidden_act=act,
        eos_token_id=49407,
    )
    return CLIPTextModel(config).eval()


def expected(network: CLIPTextModel, family: str) -> torch.Tensor:
    ids = torch.tensor([[49406, 49407, *[PADDING[family]] * 75]])
    with torch.no_grad():
        return network(ids).last_hidden_state[0]


def load(network: CLIPTextModel, tensors: dict[str, torch.Tensor]) -> None:
    """By names without the prefix that transformers 5 leaves out."""
    own = {key.removeprefix("text_model."): key for key in network.state_dict() if "position_ids" not in key}
    assert own.keys() == tensors.keys()
    network.load_state_dict({own[key]: value for key, value in tensors.items()}, strict=False)


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", "conditioner.embedders.0.transformer."])
def test_the_layout_of_stable_diffusion_1_gives_what_transformers_gives(tmp_path, prefix):
    network, random = encoder("quick_gelu", LAYERS), torch.Generator().manual_seed(1)
    own = {key.removeprefix("text_model."): value.shape for key, value in network.state_dict().items()}
    tensors = {key: random_tensor(key, shape, random) for key, shape in own.items() if "position_ids" not in key}
    load(network, tensors)
    save_file({f"{prefix}text_model.{key}": value for key, value in tensors.items()}, tmp_path / "c.safetensors")
    got = embed_empty_prompt(tmp_path / "c.safetensors", "sd15")
    assert got.shape == (77, WIDTH)
    torch.testing.assert_close(got, expected(network, "sd15"), atol=1e-5, rtol=1e-5)


def split(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP's tensors but the last layer's, under transformers' names."""
    plain = {key.removeprefix(prefix): value for key, value in state.items()}
    found = {
        "embeddings.token_embedding.weight": plain["token_embedding.weight"],
        "embeddings.position_embedding.weight": plain["positional_embedding"],
        **{f"final_layer_norm.{leaf}": plain[f"ln_final.{leaf}"] for leaf in ("weight", "bias")},
    }
    renamed = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    renamed["attn.out_proj"] = "self_attn.out_proj"
    for number in range(LAYERS - 1):
        old, new = f"transformer.resblocks.{number}.", f"encoder.layers.{number}."
        for leaf in ("weight", "bias"):
            found |= {f"{new}{there}.{leaf}": plain[f"{old}{here}.{leaf}"] for here, there in renamed.items()}
            parts = plain[f"{old}attn.in_proj_{leaf}"].chunk(3)
            found |= {f"{new}self_attn.{name}_proj.{leaf}": part for name, part in zip("qkv", parts)}
    return found


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "conditioner.embedders.0.model."])
def test_the_layout_of_stable_diffusion_2_gives_the_last_but_one_layer_and_the_final_norm(tmp_path, prefix):
    state = clip_h_state(prefix, WIDTH, LAYERS, torch.float32)
    network = encoder("gelu", LAYERS - 1)
    load(network, split(state, prefix))
    save_file(state, tmp_path / "c.safetensors")
    got = embed_empty_prompt(tmp_path / "c.safetensors", "sd21")
    torch.testing.assert_close(got, expected(network, "sd21"), atol=1e-5, rtol=1e-5)
    assert (got - expected(network, "sd15")).abs().max() > 1e-3  # the padding counts


def damaged(path: Path, change) -> Path:
    state = clip_h_state(width=64, layers=2, dtype=torch.float32)
    change(state)
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict.clear, "holds no text encoder, which even the empty prompt needs: take a full checkpoint"),
        (lambda state: state.pop("cond_stage_model.model.ln_final.bias"), "ln_final.bias is missing"),
        (lambda state: state.update({"cond_stage_model.model.token_embedding.weight": torch.ones(5, 64)}), "5 words"),
        (lambda state: state["cond_stage_model.model.ln_final.bias"].fill_(torch.nan), "NaN or infinite values"),
    ],
)
def test_a_damaged_text_encoder_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(IcmsrError, match=words):
        embed_empty_prompt(damaged(tmp_path / "c.safetensors", change), "sd21")
