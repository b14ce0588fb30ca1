"""Every way to train the wrong thing without an error, sprung: peft or diffusers alone fall into it, `Roles` not."""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.diffusers_backbone import build_networks
from icmsr_core.train.networks.adapters import make_adapter
from icmsr_core.train.networks.bases import BaseNetworks, make_unet, make_vae
from icmsr_core.train.networks.conditioning import ConditionConfig, Contexts, GeneratorConditioning
from icmsr_core.train.networks.generator import GeneratorNetworks, NetworksConfig
from icmsr_core.train.networks.roles import UNET_TARGETS, VAE_ENCODER_TARGETS, Roles, predict
from icmsr_core.train.tasks.generator import GeneratorTask
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.weights.base import open_base
from icmsr_core.weights.generator_file import Generator, GeneratorInfo, PartWeights, load_generator
from icmsr_core.weights.merging import merge_into
from tests.support.model_files import TINY
from tests.support.sd_files import unet_config, vae_config

RANKS = {"generator": 4, "auxiliary": 4}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Three tokens: attention over a single one is constant, and to_q and to_k would have no gradient in any case.
LATENT, T, CONTEXT = normal(2, 4, 8, 8), torch.tensor([200, 700]), normal(2, 3, 32, seed=1)


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = make_unet(TINY)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet.requires_grad_(False)


def fill(network: nn.Module) -> None:
    """LoRA as after some training, different in every role, from the names alone."""
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            if ".lora_" in name:
                seed = sum(map(ord, name))
                parameter.copy_(0.1 * normal(*parameter.shape, seed=seed))


def roles_on(unet: UNet2DConditionModel, filled: bool = True) -> Roles:
    torch.manual_seed(1)
    roles = Roles(unet, RANKS, UNET_TARGETS)
    if filled:
        fill(unet)
    return roles


def add_adapter(unet: UNet2DConditionModel, name: str, rank: int, targets: Sequence[str]) -> None:
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.add_adapter(config, name)


def peft_alone(*, filled: bool = True, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The same network with the same LoRA, by the public way: diffusers' add_adapter over peft."""
    unet = torch.nn.Module.to(tiny_unet(), dtype)
    torch.manual_seed(1)
    for role, rank in RANKS.items():
        add_adapter(unet, role, rank, UNET_TARGETS)
    if filled:
        fill(unet)
    return unet


def run(network: nn.Module, latent: Tensor = LATENT) -> Tensor:
    return predict(network, latent, T, CONTEXT, None)


def gradients(network: nn.Module, role: str) -> dict[str, Tensor | None]:
    return {name: entry.grad for name, entry in network.named_parameters() if f".{role}." in name}


def cosine(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> float:
    one, other = (torch.cat([value.flatten() for value in values.values()]) for values in (found, wanted))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.fixture(scope="module")
def true_gradients() -> dict[str, Tensor]:
    """The generator's, with nothing else in play: its LoRA merged into weights would give the same."""
    roles = roles_on(tiny_unet())
    with roles.use("generator"):
        run(roles.network).square().mean().backward()
    found = gradients(roles.network, "generator")
    assert all(value is not None and bool(value.any()) for value in found.values())
    return found


# 1. set_adapter flips requires_grad.


def test_trap_set_adapter_takes_the_gradients_away(true_gradients):
    unet = peft_alone()
    unet.set_adapter("generator")
    loss = run(unet).square().mean()
    unet.set_adapter("auxiliary")  # for the regulariser's term, without going back
    with torch.no_grad():
        run(unet)
    loss.backward()
    assert all(value is None for value in gradients(unet, "generator").values()), "the trap is still there"

    roles = roles_on(tiny_unet())
    with roles.use("generator"):
        loss = run(roles.network).square().mean()
    with roles.use("auxiliary"), torch.no_grad():
        run(roles.network)
    loss.backward()
    found = gradients(roles.network, "generator")
    assert found.keys() == true_gradients.keys()
    assert all(torch.equal(found[name], true_gradients[name]) for name in found)
    assert all(value is None for value in gradients(roles.network, "auxiliary").values())


# 2. Gradient checkpointing recomputes in the role that is active at backward.


@pytest.mark.parametrize("at_backward", ["teacher", "auxiliary", "generator"])
def test_checkpointing_recomputes_in_the_role_of_the_forward_pass(true_gradients, at_backward):
    roles = roles_on(tiny_unet())
    roles.enable_checkpointing()
    with roles.use("generator"):
        loss = run(roles.network).square().mean()
    with roles.use(at_backward):
        loss.backward()
        assert roles.role == at_backward, "the recomputation puts back the role it found"
    found = gradients(roles.network, "generator")
    assert all(torch.equal(found[name], true_gradients[name]) for name in true_gradients)
    assert all(value is None for value in gradients(roles.network, "auxiliary").values())


def test_trap_plain_checkpointing_recomputes_in_the_wrong_role(true_gradients):
    roles = roles_on(tiny_unet())
    roles.network.enable_gradient_checkpointing()
    with roles.use("generator"):
        loss = run(roles.network).square().mean()
    with roles.use("auxiliary"):
        loss.backward()  # no error
    found = gradients(roles.network, "generator")
    assert all(value is not None for value in found.values()), "nothing looks wrong"
    assert cosine(found, true_gradients) < 0.5, "the trap is still there"


def test_checkpointing_saves_memory_and_holds_in_mixed_precision():
    found, kept = {}, {}
    for checkpointing in (False, True):
        roles = roles_on(tiny_unet())
        if checkpointing:
            roles.enable_checkpointing()
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), roles.use("generator"):
                loss = run(roles.network).square().mean()
            with roles.use("teacher"):
                loss.backward()
        found[checkpointing], kept[checkpointing] = gradients(roles.network, "generator"), sum(sizes.values())
    assert all(torch.equal(found[False][name], found[True][name]) for name in found[False])
    assert kept[True] < kept[False] / 2


def test_checkpointing_a_vae_encoder_changes_no_gradient():
    torch.manual_seed(0)
    vae, found = make_vae(TINY), []
    picture = normal(1, 3, 32, 32)
    for checkpointing in (False, True):
        network = copy.deepcopy(vae)
        roles = Roles(network, {"generator": 4}, VAE_ENCODER_TARGETS)
        fill(network)
        if checkpointing:
            roles.enable_checkpointing()
        with roles.use("generator"):
            loss = network.encode(picture).latent_dist.mode().square().mean()
        loss.backward()  # as the teacher
        found.append(gradients(network, "generator"))
    assert all(bool(value.any()) for value in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# 3. An adapter that is not active trains nothing.


def test_trap_only_the_last_added_adapter_is_active():
    unet = tiny_unet()
    parts = {"first": ["to_q"], "second": ["conv1"], "third": ["conv2"]}  # as OSEDiff's three sets of LoRA
    for name, targets in parts.items():
        add_adapter(unet, name, 4, targets)
    run(unet).square().mean().backward()
    reached = {
        part: any(value is not None and bool(value.any()) for value in gradients(unet, part).values()) for part in parts
    }
    assert reached == {"first": False, "second": False, "third": True}, "the trap is still there"


@pytest.mark.parametrize("role", ["generator", "auxiliary"])
def test_every_layer_of_the_role_trains(role):
    roles = roles_on(tiny_unet(), filled=False)
    with roles.use(role):
        run(roles.network).square().mean().backward()
    ups = {name: value for name, value in gradients(roles.network, role).items() if ".lora_B." in name}
    layers = [name for name, module in roles.network.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(ups) == len(layers) == len(roles.lora(role))
    missing = [name for name, value in ups.items() if value is None or not bool(value.any())]
    assert missing == []
    other = next(entry for entry in RANKS if entry != role)
    assert all(value is None for value in gradients(roles.network, other).values())


@pytest.mark.parametrize("name", ["active_adapters", "disable_adapters"])
def test_a_peft_that_ignores_the_switch_is_refused(monkeypatch, name):
    roles = roles_on(tiny_unet())
    stuck = {"active_adapters": ["generator"], "disable_adapters": True}
    monkeypatch.setattr(BaseTunerLayer, name, property(lambda _: stuck[name]))
    words = r"in the role auxiliary peft runs the adapters .*: use another version"
    with pytest.raises(IcmsrError, match=words), roles.use("auxiliary"):
        pass


# 4. LoRA comes in the base's dtype, and saving converts the live model.


def test_trap_lora_in_the_bases_dtype():
    unet = peft_alone(dtype=torch.bfloat16)
    dtypes = {parameter.dtype for name, parameter in unet.named_parameters() if ".lora_" in name}
    assert torch.bfloat16 in dtypes, "the trap is still there"

    base = torch.nn.Module.to(tiny_unet(), torch.bfloat16)
    roles = roles_on(base)
    lora = [parameter for name, parameter in base.named_parameters() if ".lora_" in name]
    frozen = [parameter for name, parameter in base.named_parameters() if ".lora_" not in name]
    assert {parameter.dtype for parameter in lora} == {torch.float32}
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in frozen)
    # The optimiser's moments follow the parameters; a small step is not rounded away.
    trained = list(roles.parameters("generator").values())
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0)
    with torch.autocast("cpu", torch.bfloat16), roles.use("generator"):
        run(base).square().mean().backward()
    optimizer.step()
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert all(not torch.equal(parameter, old) for parameter, old in zip(trained, before))
    for pair in roles.lora("generator").values():
        assert pair.down.dtype == pair.up.dtype == torch.float32


def test_trap_saving_converts_the_live_model(base: Path, tmp_path: Path):
    unet = peft_alone(dtype=torch.bfloat16)
    unet.save_lora_adapter(tmp_path / "peft", adapter_name="generator", upcast_before_saving=True)
    converted = {parameter.dtype for name, parameter in unet.named_parameters() if ".lora_" not in name}
    assert converted == {torch.float32}, "the trap is still there"

    folder = open_base(base)
    loaded = BaseNetworks(*build_networks(folder, torch.bfloat16), folder.info)
    networks = GeneratorNetworks(loaded, NetworksConfig(base_dtype="bf16"), True)
    fill(networks)
    config = GeneratorConfig(losses=LossWeights(perceptual=0), networks=networks.config)
    seen = GeneratorConditioning(ConditionConfig(kind="none"), Contexts(folder.prompt_embedding()))
    task = GeneratorTask(networks, seen, folder, config, 0)
    before = {name: (value.dtype, value.detach().clone()) for name, value in task.named_parameters()}
    file = load_generator(task.export(tmp_path, {})[0])
    assert set(file.unet.lora) == set(networks.unet_roles.lora("generator"))
    for name, value in task.named_parameters():
        assert value.dtype == before[name][0], name
        assert torch.equal(value, before[name][1]), name


# 5. Roles differ, the teacher is the base, and a switch leaves nothing behind.


def test_roles_differ_and_the_teacher_is_the_base():
    unet = tiny_unet()
    bare = run(unet)
    roles = roles_on(unet, filled=False)
    fresh = {}
    for role in ("teacher", "generator", "auxiliary"):
        with roles.use(role), torch.no_grad():
            fresh[role] = run(unet)
    assert all(torch.equal(value, bare) for value in fresh.values()), "B is zero: every role begins as the base"
    fill(unet)
    found = {}
    for role in ("generator", "auxiliary", "teacher"):
        with roles.use(role), torch.no_grad():
            found[role] = run(unet)
    assert torch.equal(found["teacher"], bare)
    assert torch.equal(run(unet), bare), "outside of every block it is the teacher"
    pairs = [("generator", "teacher"), ("auxiliary", "teacher"), ("generator", "auxiliary")]
    for one, other in pairs:
        assert float((found[one] - found[other]).abs().max()) > 0.1 * float(bare.abs().max())


def test_the_role_is_back_after_an_exception():
    roles = roles_on(tiny_unet())
    with roles.use("generator"):
        wanted = run(roles.network).detach()
        with pytest.raises(RuntimeError, match="boom"), roles.use("auxiliary"):
            raise RuntimeError("boom")
        assert roles.role == "generator"
        assert torch.equal(run(roles.network).detach(), wanted)
    assert roles.role == "teacher"


SHARED = roles_on(tiny_unet())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["teacher", "generator", "auxiliary", "out", "unknown"]), max_size=12))
def test_no_sequence_of_switches_changes_what_is_trainable(sequence):
    def trainable() -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in SHARED.network.named_parameters()}

    assert trainable() == {name: ".lora_" in name for name in trainable()}
    opened, expected = [], ["teacher"]
    try:
        for entry in sequence:
            if entry == "unknown":
                with pytest.raises(IcmsrError, match="got 'unknown'"), SHARED.use(entry):
                    pass
            elif entry != "out":
                block = SHARED.use(entry)
                block.__enter__()
                opened.append(block)
                expected.append(entry)
            elif opened:
                opened.pop().__exit__(None, None, None)
                expected.pop()
            assert SHARED.role == expected[-1]
            assert trainable() == {name: ".lora_" in name for name in trainable()}
            for layer in SHARED._layers.values():
                active = [] if layer.disable_adapters else list(layer.active_adapters)
                assert active == ([] if SHARED.role == "teacher" else [SHARED.role])
    finally:
        while opened:
            opened.pop().__exit__(None, None, None)
    assert SHARED.role == "teacher"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Roles(tiny_unet(), {"teacher": 4}, UNET_TARGETS), "teacher"),
        (lambda: Roles(tiny_unet(), {"generator": 0}, UNET_TARGETS), "at least 1, got 0 for generator"),
        (lambda: Roles(tiny_unet(), {"generator": 4}, ["no_such_module"]), "generator.*no_such_module"),
    ],
)
def test_roles_that_cannot_be_are_refused(build: Callable[[], Roles], words):
    with pytest.raises(IcmsrError, match=words):
        build()


# 6. diffusers empties the list of an adapter's features.


def test_trap_features_are_consumed():
    roles = roles_on(tiny_unet())
    torch.manual_seed(2)
    features = make_adapter(4, 8, (32, 64))(torch.rand(2, 4, 64, 64))
    given_features = [level.detach() for level in features]
    consumed = list(given_features)
    first, second = (
        roles.network(LATENT, T, encoder_hidden_states=CONTEXT, down_intrablock_additional_residuals=consumed).sample
        for _ in range(2)
    )
    assert not torch.equal(first, second), "the trap is still there"
    assert torch.equal(second, run(roles.network)), "the second call ran unconditioned"

    kept = list(given_features)
    once, twice = (predict(roles.network, LATENT, T, CONTEXT, kept) for _ in range(2))
    assert torch.equal(once, first)
    assert torch.equal(twice, first)
    assert len(kept) == len(given_features)
    assert all(torch.equal(one, other) for one, other in zip(kept, given_features))


# 7. What is trained in Stable Diffusion.


def test_lora_of_stable_diffusion_has_the_published_number_of_parameters():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config("sd21"))
        vae = AutoencoderKL.from_config(vae_config())
        roles, encoder = Roles(unet, RANKS, UNET_TARGETS), Roles(vae, {"generator": 4}, VAE_ENCODER_TARGETS)
    for role in RANKS:
        assert len(roles.lora(role)) == 258
        assert sum(parameter.numel() for parameter in roles.parameters(role).values()) == 4_055_712
    modules = encoder.lora("generator")
    assert len(modules) == 32
    assert all(name.startswith("encoder.") or name == "quant_conv" for name in modules), "the decoder has none"
    assert "quant_conv" in modules
    trainable = {name for name, parameter in vae.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 64


# 8. What is exported is what was trained.


def lora_generator(unet: PartWeights | None = None, vae: PartWeights | None = None) -> Generator:
    """A generator of LoRA of rank 4 and alpha 4."""
    info = GeneratorInfo("nano", 200, "eps", rank=4, alpha=4.0)
    return Generator(info, unet or PartWeights(), vae or PartWeights())


@pytest.mark.parametrize("role", ["generator", "auxiliary"])
def test_merged_lora_is_the_live_role(role):
    roles = roles_on(tiny_unet())
    bare, merged = tiny_unet(), tiny_unet()
    merge_into(merged, lora_generator(unet=PartWeights(lora=roles.lora(role))), "unet")
    with roles.use(role), torch.no_grad():
        live = run(roles.network)
    scale = float(live.abs().max())
    assert float((run(merged) - live).abs().max()) < 1e-5 * scale
    assert float((run(bare) - live).abs().max()) > 0.1 * scale


def test_merged_vae_lora_is_the_live_role():
    torch.manual_seed(0)
    vae = make_vae(TINY).requires_grad_(False)
    merged, picture = copy.deepcopy(vae), normal(1, 3, 32, 32)
    roles = Roles(vae, {"generator": 4}, VAE_ENCODER_TARGETS)
    fill(vae)
    merge_into(merged, lora_generator(vae=PartWeights(lora=roles.lora("generator"))), "vae")
    with roles.use("generator"), torch.no_grad():
        live = vae.encode(picture).latent_dist.mode()
    assert float((merged.encode(picture).latent_dist.mode() - live).abs().max()) < 1e-5 * float(live.abs().max())
    with torch.no_grad():
        assert torch.equal(vae.decode(live).sample, merged.decode(live).sample)
