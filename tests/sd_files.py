"""Folders in the exact layout of published Stable Diffusion models, with random weights, for tests and measurements."""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from icmsr_core.base_folder import BaseInfo, write_base_info

CONTEXT_WIDTH = {"sd15": 768, "sd21": 1024}
WEIGHTS = "diffusion_pytorch_model"
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_sd_folder(
    folder: Path,
    family: str = "sd21",
    width_divisor: int = 1,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    shards: int = 1,
    seed: int = 0,
    old_attention_names: bool = False,
) -> Path:
    """UNet, VAE and scheduler of `family` ("sd15", "sd21"), every tensor random.

    `width_divisor` 1 is the published size and a plain folder; 2, 5 and 10 are narrower networks with the same keys,
    and an icmsr_base.json that gives their family. `variant` is the "fp16" of a file's name; `shards` is the number
    of files that the UNet's tensors are spread over, with an index if there are several; `old_attention_names` writes
    the VAE's attention as diffusers did before 0.17.
    """
    random = torch.Generator().manual_seed(seed)
    for part, kind, config in (
        ("unet", UNet2DConditionModel, unet_config(family, width_divisor)),
        ("vae", AutoencoderKL, vae_config(width_divisor)),
    ):
        write_json(folder / part / "config.json", config)
        with init_empty_weights():
            shapes = {key: value.shape for key, value in kind.from_config(config).state_dict().items()}
        state = {key: random_tensor(key, shape, random).to(dtype) for key, shape in shapes.items()}
        if part == "vae" and old_attention_names:
            state = {old_name(key): value for key, value in state.items()}
        write_weights(folder / part, state, variant, shards if part == "unet" else 1)
    write_json(folder / "scheduler/scheduler_config.json", scheduler_config(family))
    if width_divisor != 1:
        write_base_info(folder, BaseInfo(f"random {family}", family, licence="CC0-1.0"))
    return folder


def write_text_encoder(folder: Path, width: int, layers: int = 2, variant: str | None = None, seed: int = 0) -> Path:
    """text_encoder/ and tokenizer/ as published with SD2.1 (weights named text_model.*, padded with "!"), tiny.

    The vocabulary is made up: letters, and the one merged word "cat".
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    vocabulary = {word: number for number, word in enumerate([*words, "ca", "cat</w>"])}
    write_json(folder / "tokenizer/vocab.json", vocabulary)
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "tokenizer/special_tokens_map.json", {**marks, "pad_token": "!"})
    write_json(
        folder / "tokenizer/tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **marks, "pad_token": "<|endoftext|>"},
    )
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=77, hidden_act="gelu", bos_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )
    write_json(folder / "text_encoder/config.json", {**config.to_dict(), "architectures": ["CLIPTextModel"]})
    random = torch.Generator().manual_seed(seed)
    # transformers 5 leaves out the prefix that the published files have.
    state = {
        f"text_model.{key.removeprefix('text_model.')}": random_tensor(key, value.shape, random)
        for key, value in CLIPTextModel(config).state_dict().items()
        if "position_ids" not in key
    }
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    suffix = f".{variant}.safetensors" if variant else ".safetensors"
    save_file(state, folder / f"text_encoder/model{suffix}", metadata={"format": "pt"})
    return folder


def unet_config(family: str, width_divisor: int = 1) -> dict:
    """unet/config.json as published with SD1.5 and SD2.1-base, narrowed."""
    heads = [5, 10, 20, 20]  # named attention_head_dim, but it is their number
    own = {
        "sd15": {"attention_head_dim": 8},
        "sd21": {
            "attention_head_dim": [max(1, number // width_divisor) for number in heads],
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "use_linear_projection": True,
        },
    }[family]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": {"sd15": "0.6.0", "sd21": "0.10.0.dev0"}[family],
        "act_fn": "silu",
        "block_out_channels": narrowed((320, 640, 1280, 1280), width_divisor),
        "center_input_sample": False,
        "cross_attention_dim": narrowed((CONTEXT_WIDTH[family],), width_divisor)[0],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        **own,
    }


def vae_config(width_divisor: int = 1) -> dict:
    """vae/config.json as published with SD1.5 (which does not state the scaling factor), narrowed."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": narrowed((128, 256, 512, 512), width_divisor),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def scheduler_config(family: str) -> dict:
    """scheduler/scheduler_config.json as published; SD1.5's does not state what the UNet predicts."""
    stated = {"prediction_type": "epsilon"} if family == "sd21" else {}
    return {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        **stated,
    }


def write_weights(folder: Path, state: dict[str, torch.Tensor], variant: str | None = None, shards: int = 1) -> None:
    """The tensors as diffusers saves them: one file, or `shards` of them under an index."""
    suffix = f".{variant}.safetensors" if variant else ".safetensors"
    if shards == 1:
        save_file(state, folder / f"{WEIGHTS}{suffix}", metadata={"format": "pt"})
        return
    weight_map, keys = {}, list(state)
    for number in range(shards):
        name = f"{WEIGHTS}-{number + 1:05}-of-{shards:05}{suffix}"
        own = {key: state[key] for key in keys[number::shards]}
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    size = sum(value.nbytes for value in state.values())
    write_json(folder / f"{WEIGHTS}{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def narrowed(widths: tuple[int, ...], divisor: int) -> list[int]:
    """The widths over `divisor`, in whole multiples of GroupNorm's 32 groups."""
    return [max(32, width // divisor // 32 * 32) for width in widths]


def random_tensor(key: str, shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """Weights that keep activations small: normal * 0.02, around 1 for the scales of the norms."""
    centre = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
    return torch.empty(shape).normal_(centre, 0.02, generator=random)


def old_name(key: str) -> str:
    """A VAE key as diffusers wrote it before 0.17."""
    if ".attentions." in key:
        for new, old in OLD_ATTENTION.items():
            key = key.replace(f".{new}.", f".{old}.")
    return key
