"""Foreign checkpoints for tests, made as their own tools make them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from icmsr_core.weights.generator_file import load_generator
from tests.support.merging import merged_part
from tests.support.sd_files import unet_config, vae_config

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
"""As the peers' training code lists them: a reference of its own, not taken from ours."""


RANK_UNET, RANK_VAE, PEFT_ALPHA = 2, 4, 8
"""Different, so that a scale taken from the wrong network shows."""


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


HYPIR_TARGETS = tuple(target for target in TARGETS if target != "conv_in")
OMGSR_TARGETS = ("conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0")
OMGSR_RANKS = {"unet": 32, "vae": 16}


def shapes_ending(shapes: Mapping[str, Sequence[int]], ends: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of each module of a network whose name ends in one of `ends`."""
    modules = {key.removesuffix(".weight"): tuple(shape) for key, shape in shapes.items() if key.endswith(".weight")}
    return {name: shape for name, shape in modules.items() if any(f".{name}".endswith(f".{end}") for end in ends)}


def random_pair(shape: Sequence[int], rank: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a LoRA for a weight of `shape`, with an update of about a tenth of a random weight's scale."""
    down = torch.randn(rank, *shape[1:], generator=random) / rank**0.5
    return down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=random) * 0.005


def hypir_checkpoint(unet: Mapping[str, Sequence[int]], rank: int = 256, seed: int = 5) -> dict[str, torch.Tensor]:
    """What HYPIR saves for a UNet with parameters of these shapes: a flat dictionary, bare names, no alpha."""
    random, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes_ending(unet, HYPIR_TARGETS).items():
        down, up = random_pair(shape, rank, random)
        state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"] = down, up
    return state


def write_omgsr(folder: Path, unet: Mapping[str, Sequence[int]], vae: Mapping[str, Sequence[int]]) -> Path:
    """OMGSR-S's two PEFT folders for networks with parameters of these shapes."""
    encoder = {key.removeprefix("encoder."): shape for key, shape in vae.items() if key.startswith("encoder.")}
    random = torch.Generator().manual_seed(6)
    for part, name, shapes in (("unet", "unet", unet), ("vae", "vae_encoder", encoder)):
        rank, state = OMGSR_RANKS[part], {}
        for module, shape in shapes_ending(shapes, OMGSR_TARGETS).items():
            for half, matrix in zip("AB", random_pair(shape, rank, random)):
                state[f"base_model.model.{module}.lora_{half}.weight"] = matrix
        target = folder / f"{name}_lora_adapter"
        target.mkdir(parents=True)
        save_file(state, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "use_dora": False}
        (target / "adapter_config.json").write_text(json.dumps(config))
    return folder


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


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
