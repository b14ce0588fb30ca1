"""Folders and checkpoint files in the exact layout of published Stable Diffusion models, with random weights."""

import json
import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from icmsr_core.train.networks.roles import UNET_TARGETS, VAE_ENCODER_TARGETS
from icmsr_core.weights.base import BaseFolder, BaseInfo, write_base_info
from icmsr_core.weights.generator_file import Generator, GeneratorInfo, LoraPair, PartWeights
from icmsr_core.weights.single_file import BASE_FORMAT

CONTEXT_WIDTH = {"sd15": 768, "sd21": 1024}
WEIGHTS = "diffusion_pytorch_model"
ORIGINAL_PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_sd_folder(
    folder: Path,
    family: str = "sd21",
    width_divisor: int = 1,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    shards: int = 1,
    old_attention_names: bool = False,
) -> Path:
    """UNet, VAE and scheduler of `family` ("sd15", "sd21"), every tensor random.

    `width_divisor` 1 is the published size and a plain folder; 2, 5 and 10 are narrower networks with the same keys,
    and an icmsr_base.json that gives their family. `variant` is the "fp16" of a file's name; `shards` is the number
    of files that the UNet's tensors are spread over, with an index if there are several; `old_attention_names` writes
    the VAE's attention as diffusers did before 0.17.
    """
    configs = {"unet": unet_config(family, width_divisor), "vae": vae_config(width_divisor)}
    for part, state in random_states(family, width_divisor, dtype, 0).items():
        write_json(folder / part / "config.json", configs[part])
        if part == "vae" and old_attention_names:
            state = {old_name(key): value for key, value in state.items()}
        write_weights(folder / part, state, variant, shards if part == "unet" else 1)
    write_json(folder / "scheduler/scheduler_config.json", scheduler_config(family))
    if width_divisor != 1:
        write_base_info(folder, BaseInfo(f"random {family}", family, licence="CC0-1.0"))
    return folder


def write_sd_checkpoint(
    path: Path, family: str = "sd21", width_divisor: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """The tensors of `write_sd_folder` with the same arguments as one checkpoint in the original (CompVis) layout.

    A few tensors of the text encoder, the running average and the noise schedule lie beside them, as in published
    files. Narrow ones describe themselves in the metadata.
    """
    state = {}
    for part, tensors in random_states(family, width_divisor, dtype, seed).items():
        state |= {original_name(part, key): original_tensor(part, key, value) for key, value in tensors.items()}
    encoder = {"sd15": "transformer.text_model.embeddings.token_embedding", "sd21": "model.token_embedding"}[family]
    state |= {
        f"cond_stage_model.{encoder}.weight": torch.ones(5, CONTEXT_WIDTH[family], dtype=dtype),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square(),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    values = {"name": f"random {family}", "family": family, "licence": "CC0-1.0"}
    own = {"format": "icmsr-base", "icmsr": json.dumps(values)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"} if width_divisor == 1 else own)
    return path


def core_configs(family: str, full: bool = False) -> dict[str, dict]:
    """Configurations of UNet and VAE as ComfyUI's core knows `family`: by the first width and the text's width.

    Published size with `full`; otherwise a UNet of a sixth of the parameters with the same keys: the second level is
    the widest, so that no shortcut between levels is missing. The VAE is the published one: core builds no other.
    """
    unet = unet_config(family)
    if not full:
        unet["block_out_channels"] = [320, 640, 320, 320]
        if family == "sd21":
            unet["attention_head_dim"] = [5, 10, 5, 5]
    return {"unet": unet, "vae": vae_config()}


def write_core_base(
    folder: Path, checkpoint: Path, family: str, full: bool = False, dtype: torch.dtype = torch.float16, seed: int = 0
) -> None:
    """The same random tensors as a diffusers folder and as a checkpoint in the original layout, both in `dtype`.

    The UNet is that of `core_configs`. Nothing of a text encoder is in the checkpoint: core then gives no CLIP. What
    is not `full` describes itself, as `write_sd_folder`'s narrower networks do.
    """
    random, state = torch.Generator().manual_seed(seed), {}
    pool = torch.empty(1 << 24).normal_(0.0, 0.02, generator=random).to(dtype)
    values = {"name": f"random {family}", "family": family, "licence": "CC0-1.0"}
    for part, config in core_configs(family, full).items():
        tensors = {key: pooled_tensor(key, shape, pool, random) for key, shape in shapes_of(part, config).items()}
        write_json(folder / part / "config.json", config)
        write_weights(folder / part, tensors)
        state |= {original_name(part, key): original_tensor(part, key, value) for key, value in tensors.items()}
    write_json(folder / "scheduler/scheduler_config.json", scheduler_config(family))
    if not full:
        write_base_info(folder, BaseInfo(**values))
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    own = {"format": BASE_FORMAT, "icmsr": json.dumps(values)}
    save_file(state, checkpoint, metadata={"format": "pt"} if full else own)


def complete_generator(
    base: BaseFolder, prediction: str = "eps", rank: int = 4, seed: int = 3, timestep: int = 999
) -> Generator:
    """What training makes of a base: LoRA on each of its standard targets in UNet and VAE encoder, and the prompt."""
    random = torch.Generator().manual_seed(seed)

    def is_target(part: str, module: str) -> bool:
        if part == "vae":
            return re.fullmatch(VAE_ENCODER_TARGETS, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in UNET_TARGETS)

    parts = {}
    for part, config in (("unet", base.unet_config), ("vae", base.vae_config)):
        modules = {
            key.removesuffix(".weight"): shape
            for key, shape in shapes_of(part, dict(config)).items()
            if key.endswith(".weight") and len(shape) > 1
        }
        parts[part] = PartWeights(
            {
                module: LoraPair(
                    torch.randn(rank, *shape[1:], generator=random) * 0.05,
                    torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=random) * 0.05,
                )
                for module, shape in modules.items()
                if is_target(part, module)
            }
        )
    info = GeneratorInfo(base.info.family, timestep, prediction, rank=rank, alpha=float(rank), licence="CC0-1.0")
    context = torch.randn(77, base.unet_config["cross_attention_dim"], generator=random)
    return Generator(info, parts["unet"], parts["vae"], context)


def lora_everywhere(
    base: BaseFolder, prediction: str = "eps", rank: int = 2, seed: int = 3, base_hash: str = ""
) -> Generator:
    """A generator of the base's family: LoRA on every matrix of UNet and VAE encoder, and a prompt embedding."""
    random = torch.Generator().manual_seed(seed)
    parts = {}
    for part, config in (("unet", base.unet_config), ("vae", base.vae_config)):
        parts[part] = PartWeights(
            {
                key.removesuffix(".weight"): LoraPair(
                    torch.randn(rank, *shape[1:], generator=random) * 0.02,
                    torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=random) * 0.02,
                )
                for key, shape in shapes_of(part, dict(config)).items()
                if len(shape) > 1 and "decoder" not in key
            }
        )
    info = GeneratorInfo(base.info.family, 999, prediction, base_hash=base_hash, rank=rank, alpha=4.0)
    context = torch.randn(7, base.unet_config["cross_attention_dim"], generator=random)
    return Generator(info, parts["unet"], parts["vae"], context)


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
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=2,
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


def clip_l_config() -> dict:
    """text_encoder/config.json as published with SD1.5, but for what nothing reads."""
    return {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def clip_l_state(dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of SD1.5's text encoder at its published size, under its names in a checkpoint."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights():
        model = CLIPTextModel(CLIPTextConfig(**clip_l_config()))
    random = torch.Generator().manual_seed(seed)
    pool = torch.empty(1 << 24).normal_(0.0, 0.02, generator=random).to(dtype)
    state = {
        f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": pooled_tensor(
            key, value.shape, pool, random
        )
        for key, value in model.state_dict().items()
        if "position_ids" not in key
    }
    positions = torch.arange(77)[None]
    return {**state, "cond_stage_model.transformer.text_model.embeddings.position_ids": positions}


def clip_h_state(
    prefix: str = "cond_stage_model.model.", width: int = 1024, layers: int = 24, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Random tensors of SD2.1's text encoder, OpenCLIP's names with its fused query, key and value."""
    shapes = {"token_embedding.weight": (49408, width), "positional_embedding": (77, width)}
    for number in range(layers):
        block = f"transformer.resblocks.{number}"
        shapes |= {f"{block}.{norm}.{leaf}": (width,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, out, into in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, width)}
    random = torch.Generator().manual_seed(9)
    pool = torch.empty(1 << 22).normal_(0.0, 0.02, generator=random).to(dtype)
    state = {prefix + key: pooled_tensor(key, torch.Size(shape), pool, random) for key, shape in shapes.items()}
    return {**state, f"{prefix}logit_scale": torch.tensor(4.6)}


def shapes_of(part: str, config: dict) -> dict[str, torch.Size]:
    """Shape of every tensor of the network, by its diffusers name."""
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    with init_empty_weights():
        return {key: value.shape for key, value in kind.from_config(config).state_dict().items()}


def random_states(family: str, width_divisor: int, dtype: torch.dtype, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random tensors of UNet and VAE under their diffusers names."""
    random = torch.Generator().manual_seed(seed)
    configs = {"unet": unet_config(family, width_divisor), "vae": vae_config(width_divisor)}
    return {
        part: {key: random_tensor(key, shape, random).to(dtype) for key, shape in shapes_of(part, config).items()}
        for part, config in configs.items()
    }


def original_name(part: str, key: str) -> str:
    """The name that the original code (CompVis, Stability AI) gives to what diffusers calls `key`."""
    return ORIGINAL_PREFIX[part] + {"unet": original_unet_name, "vae": original_vae_name}[part](key)


def original_unet_name(key: str) -> str:
    module, leaf = key.rsplit(".", 1)
    outside = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if module in outside:
        return f"{outside[module]}.{leaf}"
    pairs = []  # one list of modules, in the order in which a picture passes them there
    for level in range(4):
        for layer in range(2):
            pairs.append((f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{1 + 3 * level + layer}.0."))
            pairs.append((f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{1 + 3 * level + layer}.1."))
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{3 + 3 * level}.0.op."))
        for layer in range(3):
            pairs.append((f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{3 * level + layer}.0."))
            pairs.append((f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{3 * level + layer}.1."))
        # The deepest level has no attention, so that its upsampler comes second there and third elsewhere.
        pairs.append(
            (f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{2 + 3 * level}.{1 if level == 0 else 2}.conv.")
        )
    pairs += [
        ("mid_block.resnets.0.", "middle_block.0."),
        ("mid_block.attentions.0.", "middle_block.1."),
        ("mid_block.resnets.1.", "middle_block.2."),
    ]
    (name,) = [key.replace(theirs, original, 1) for theirs, original in pairs if key.startswith(theirs)]
    if ".resnets." in key:
        for theirs, original in (
            ("norm1", "in_layers.0"),
            ("conv1", "in_layers.2"),
            ("norm2", "out_layers.0"),
            ("conv2", "out_layers.3"),
            ("time_emb_proj", "emb_layers.1"),
            ("conv_shortcut", "skip_connection"),
        ):
            name = name.replace(f".{theirs}.", f".{original}.")
    return name


def original_vae_name(key: str) -> str:
    for theirs, original in (
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
        ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
        ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        *((f"down_blocks.{level}", f"down.{level}") for level in range(4)),
        *((f"up_blocks.{level}", f"up.{3 - level}") for level in range(4)),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("resnets", "block"),
    ):
        key = key.replace(f".{theirs}.", f".{original}.")
    return key


def original_tensor(part: str, key: str, value: torch.Tensor) -> torch.Tensor:
    """The VAE's attention is 1x1 convolutions there."""
    return value[:, :, None, None] if part == "vae" and ".attentions." in key and value.ndim == 2 else value


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
    middle = f".{variant}" if variant else ""
    if shards == 1:
        save_file(state, folder / f"{WEIGHTS}{middle}.safetensors", metadata={"format": "pt"})
        return
    weight_map, keys = {}, list(state)
    for number in range(shards):
        name = f"{WEIGHTS}{middle}-{number + 1:05}-of-{shards:05}.safetensors"
        own = {key: state[key] for key in keys[number::shards]}
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    size = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / f"{WEIGHTS}.safetensors.index{middle}.json", index)


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def narrowed(widths: tuple[int, ...], divisor: int) -> list[int]:
    """The widths over `divisor`, in whole multiples of GroupNorm's 32 groups."""
    return [max(32, width // divisor // 32 * 32) for width in widths]


def random_tensor(key: str, shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """Weights that keep activations small: normal * 0.02, around 1 for the scales of the norms."""
    centre = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
    return torch.empty(shape).normal_(centre, 0.02, generator=random)


def pooled_tensor(key: str, shape: torch.Size, pool: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """As `random_tensor`, out of numbers that are drawn already: at the published size drawing takes longest."""
    count = shape.numel()
    start = int(torch.randint(max(1, len(pool) - count), (1,), generator=random))
    values = pool.repeat(-(-count // len(pool)))[start : start + count] if count > len(pool) else pool[start:][:count]
    return values.reshape(shape) + (1.0 if len(shape) == 1 and key.endswith("weight") else 0.0)


def old_name(key: str) -> str:
    """A VAE key as diffusers wrote it before 0.17."""
    if ".attentions." in key:
        for new, old in OLD_ATTENTION.items():
            key = key.replace(f".{new}.", f".{old}.")
    return key
