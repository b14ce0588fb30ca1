"""`fix_step` against the plain UNet: the same result with less work, and the plain way wherever it does not apply."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from icmsr_core.errors import IcmsrError
from icmsr_core.runtime.fixed_step import fix_step, release_step
from icmsr_core.train.networks.bases import NetworkConfig, make_unet

TOLERANCE = 1e-5
"""Largest difference over the scale of the output: float32 rounding."""
STEP = 999


def small_unet(tokens: int = 1, self_attention: bool = True) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = NetworkConfig(
        4, unet_channels=(32, 64), head_width=16, context_tokens=tokens, unet_self_attention=self_attention
    )
    unet = make_unet(config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return unet


def sd_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1's kind: convolutions as projections, attention heads by number, four levels."""
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32, 64, 64),
            attention_head_dim=4,
            cross_attention_dim=24,
            down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        )
        .eval()
        .requires_grad_(False)
    )


def context_for(unet: UNet2DConditionModel, tokens: int, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, unet.config.cross_attention_dim, generator=random)


def adapter_features(unet: UNet2DConditionModel, sample: Tensor) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    count, _, height, width = sample.shape
    return [
        torch.randn(count, channels, height >> level, width >> level, generator=random)
        for level, channels in enumerate(unet.config.block_out_channels)
    ]


@torch.inference_mode()
def run(unet: UNet2DConditionModel, sample: Tensor, context: Tensor, timestep: object = STEP, **options) -> Tensor:
    return unet(sample, timestep, encoder_hidden_states=context.expand(len(sample), -1, -1), **options).sample


def sample_for(unet: UNet2DConditionModel, batch: int = 3) -> Tensor:
    return torch.randn(batch, unet.config.in_channels, 8, 16, generator=torch.Generator().manual_seed(2))


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def calls_of(unet: UNet2DConditionModel, ending: str, run_it: Callable[[], object]) -> int:
    """How many modules whose name ends so run in `run_it`."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    hooks = [module.register_forward_hook(note) for name, module in unet.named_modules() if name.endswith(ending)]
    run_it()
    for hook in hooks:
        hook.remove()
    return count


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (lambda: small_unet(1), 1),
        (lambda: small_unet(77), 77),
        (lambda: small_unet(1, False), 1),
        (lambda: small_unet(3, False), 3),
        (sd_unet, 1),
        (sd_unet, 77),
    ],
)
def test_a_fixed_step_gives_the_same_result(make: Callable[[], UNet2DConditionModel], tokens: int) -> None:
    unet = make()
    context, sample = context_for(unet, tokens), sample_for(unet)

    def with_adapter() -> Tensor:
        return run(unet, sample, context, down_intrablock_additional_residuals=adapter_features(unet, sample))

    plain, adapted, keys = run(unet, sample, context), with_adapter(), list(unet.state_dict())
    assert not torch.equal(plain, adapted)
    fix_step(unet, STEP, context)
    assert list(unet.state_dict()) == keys
    assert_same(run(unet, sample, context), plain)
    assert_same(run(unet, sample[:1], context), plain[:1])
    assert_same(with_adapter(), adapted)
    release_step(unet)
    assert torch.equal(run(unet, sample, context), plain)
    assert not [name for name, module in unet.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(("tokens", "queries"), [(1, 0), (77, 6)])
def test_a_fixed_step_does_less_work(tokens: int, queries: int) -> None:
    unet = small_unet(tokens)
    context, sample = context_for(unet, tokens), sample_for(unet)
    names = ("time_emb_proj", "attn2.to_k", "attn2.to_v", "attn2.to_q", "attn2.to_out.0", "norm2", "attn1.to_q")

    def counts() -> dict[str, int]:
        return {name: calls_of(unet, name, lambda: run(unet, sample, context)) for name in names}

    before = counts()
    assert all(before.values())
    fix_step(unet, STEP, context)
    run(unet, sample, context)  # computes the constants
    after = counts()
    assert [after[name] for name in names[:3]] == [0, 0, 0]
    assert after["attn2.to_q"] == after["attn2.to_out.0"] == queries
    assert before["attn2.to_q"] == before["attn1.to_q"] == after["attn1.to_q"] == 6


def test_attention_to_the_context_alone_is_a_constant() -> None:
    unet = small_unet(1, self_attention=False)
    context, sample = context_for(unet, 1), sample_for(unet)
    assert calls_of(unet, "attn1.to_q", lambda: run(unet, sample, context)) == 5
    fix_step(unet, STEP, context)
    assert calls_of(unet, "attn1.to_q", lambda: run(unet, sample, context)) == 0


@pytest.mark.parametrize("tokens", [1, 5])
def test_other_calls_run_as_before(tokens: int) -> None:
    unet, reference = small_unet(tokens), small_unet(tokens)
    context, sample = context_for(unet, tokens), sample_for(unet, 2)
    fix_step(unet, STEP, context)
    mask = torch.ones(2, tokens)
    mask[:, 1:] = 0
    both = torch.cat([context, context_for(unet, tokens, seed=8)])
    for other, timestep, options in (
        (context, 3, {}),
        (context, torch.tensor([STEP, 3]), {}),
        (context_for(unet, tokens, seed=9), STEP, {}),
        (both, STEP, {}),
        (context_for(unet, tokens + 1), STEP, {}),
        (context, STEP, {"encoder_attention_mask": mask}),
        (context, STEP, {"cross_attention_kwargs": {}}),
    ):
        expected = run(reference, sample, other, timestep, **options)
        assert torch.equal(run(unet, sample, other, timestep, **options), expected)
    for timestep in (STEP, torch.tensor(STEP), torch.tensor([STEP, STEP])):
        assert_same(run(unet, sample, context.clone(), timestep), run(reference, sample, context, timestep))
        assert calls_of(unet, "time_emb_proj", lambda: run(unet, sample, context, timestep)) == 0  # noqa: B023


def test_a_context_that_was_written_into_is_another() -> None:
    unet, reference = small_unet(4), small_unet(4)
    context, sample = context_for(unet, 4), sample_for(unet)
    fix_step(unet, STEP, context)
    run(unet, sample, context)
    context.mul_(2)
    assert torch.equal(run(unet, sample, context), run(reference, sample, context))


def test_weights_may_change_after_the_step_is_fixed() -> None:
    unet, reference = small_unet(1), small_unet(1)
    context, sample = context_for(unet, 1), sample_for(unet)
    fix_step(unet, STEP, context)
    run(unet, sample, context)
    other = {key: value + 0.1 * torch.randn_like(value) for key, value in unet.state_dict().items()}
    for assign in (False, True):
        for network in (unet, reference):
            network.load_state_dict({key: value + 0.01 * assign for key, value in other.items()}, assign=assign)
        assert_same(run(unet, sample, context), run(reference, sample, context))
    for network in (unet, reference):
        torch.nn.Module.to(network, torch.bfloat16)
    sample, context = sample.bfloat16(), context.bfloat16()
    fix_step(unet, STEP, context)
    fixed, plain = run(unet, sample, context).float(), run(reference, sample, context).float()
    assert float((fixed - plain).abs().max()) <= 0.03 * float(plain.abs().max())
    torch.nn.Module.to(unet, torch.float32)
    torch.nn.Module.to(reference, torch.float32)
    assert_same(run(unet, sample.float(), context.float()), run(reference, sample.float(), context.float()))


def test_lora_is_never_passed_over() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def with_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
        torch.manual_seed(3)
        targets = ["to_v", "conv1", "time_emb_proj"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), unet)
        return unet

    context = context_for(small_unet(1), 1)
    before, after, reference = small_unet(1), small_unet(1), with_lora(small_unet(1))
    sample = sample_for(before)
    fix_step(before, STEP, context)
    run(before, sample, context)
    with_lora(before)
    with_lora(after)
    fix_step(after, STEP, context)
    for unet in (before, after):
        assert_same(run(unet, sample, context), run(reference, sample, context))


def test_other_processors_are_kept() -> None:
    class Doubled:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return 2 * hidden_states

    unet, reference = small_unet(1), small_unet(1)
    context, sample = context_for(unet, 1), sample_for(unet)
    fix_step(unet, STEP, context)
    for network in (unet, reference):
        network.set_attn_processor(Doubled())
    assert_same(run(unet, sample, context), run(reference, sample, context))
    fix_step(unet, STEP, context)
    assert_same(run(unet, sample, context), run(reference, sample, context))


def test_gradients_reach_the_weights() -> None:
    unet = small_unet(1).requires_grad_(True)
    context, sample = context_for(unet, 1), sample_for(unet)
    fix_step(unet, STEP, context)
    unet(sample, STEP, context.expand(3, -1, -1)).sample.sum().backward()
    parameter = unet.get_parameter("down_blocks.0.resnets.0.time_emb_proj.weight")
    assert parameter.grad is not None
    assert float(parameter.grad.abs().max()) > 0


def test_a_step_may_be_fixed_again_at_another_timestep() -> None:
    unet, reference = small_unet(3), small_unet(3)
    sample = sample_for(unet)
    for timestep, seed in ((STEP, 1), (20, 2)):
        context = context_for(unet, 3, seed)
        fix_step(unet, timestep, context[0])
        assert_same(run(unet, sample, context, timestep), run(reference, sample, context, timestep))
        assert calls_of(unet, "time_emb_proj", lambda: run(unet, sample, context, timestep)) == 0  # noqa: B023
    release_step(unet)
    release_step(unet)


def test_contexts_of_other_shapes_and_labelled_networks_are_refused() -> None:
    unet = small_unet(1)
    for shape in ((32,), (2, 1, 32), (1, 1, 33), (4, 33)):
        with pytest.raises(IcmsrError, match=r"context must be .* got \["):
            fix_step(unet, STEP, torch.zeros(shape))
    labelled = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=8,
        num_class_embeds=3,
    )
    with pytest.raises(IcmsrError, match="num_class_embeds"):
        fix_step(labelled, STEP, torch.zeros(1, 8))
