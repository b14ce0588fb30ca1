"""What never changes in a one-step generator is computed once: all that timestep and context decide. Source: ours.

A generator runs a UNet2DConditionModel at one timestep with one context, picture after picture, tile after tile. Then

- the time embedding's projection in each residual block is one vector, which goes into the bias of the convolution
  before it: no projection, and no pass over the map to add it;
- keys and values of every attention to the context are constants, for all pictures of a batch alike;
- with a context of ONE token the softmax is 1 whatever the query, so that the attention's result is the constant
  to_out(to_v(context)): query, attention, the norm before it and the projection after it are all left out, exactly.

Modules keep their parameters and their names; only ``forward`` of each is replaced, on the instance. Works on the
layers' shape, not their class, so that this module needs no diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import IcmsrError

PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
"""diffusers' attention without additions of others (an IP-Adapter's processor reads more than the context)."""
ABSENT = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
"""Parts of diffusers' Attention that Stable Diffusion's UNets do not have."""
KEPT_ARGUMENTS = (
    "down_intrablock_additional_residuals",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "return_dict",
)
"""Arguments that act outside what is computed once. With any other one a call runs as if nothing were fixed."""
OTHER_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "dual_cross_attention",
)
"""Configuration entries of UNets whose embedding or context depends on more than timestep and context."""


Forward = Callable[..., Any]


def fix_step(
    unet: nn.Module, timestep: int, context: Tensor, compiled: Callable[[Forward], Forward] | None = None
) -> None:
    """Lets `unet` (diffusers' UNet2DConditionModel) compute what `timestep` and `context` alone decide just once.

    `context` is [tokens, width] or [1, tokens, width]. Later calls at this timestep with this context, for any batch,
    give the plain UNet's result but for rounding (float32: 1e-5 of the output's scale). All other calls run as before:
    another timestep or context, masks, `cross_attention_kwargs`, or gradients for the weights. A T2I-Adapter's and a
    ControlNet's residuals go with it. Weights may change, be cast or moved: what follows from them is computed anew
    (only writing into a weight's ``.data`` goes unnoticed). Layers that are no plain convolution or linear layer
    (unmerged LoRA) stay as they are, and where one is exchanged later every call runs as before. On an accelerator pass
    the timestep as an int, and a view of the very `context`: anything else must be read back first. Undo with
    `release_step`, also before copying the module. `compiled` is given the UNet's forward for one to run in its place;
    what is kept and compared from call to call stays outside.
    Raises `IcmsrError` for a context that does not fit, and for a UNet with inputs beside sample, timestep and context.
    """
    release_step(unet)
    config: Any = unet.config
    beyond = [key for key in OTHER_INPUTS if config.get(key)]
    if beyond:
        raise IcmsrError(f"fix_step does not support a UNet with {', '.join(beyond)}: run it without")
    context = context[None] if context.ndim == 2 else context
    width = config["cross_attention_dim"]
    if context.ndim != 3 or context.shape[0] != 1 or context.shape[-1] != width:
        raise IcmsrError(
            f"context must be [tokens, {width}] or [1, tokens, {width}] for this UNet, got {list(context.shape)}"
        )
    FixedStep(unet, timestep, context.detach(), compiled or (lambda forward: forward)).install()


def release_step(unet: nn.Module) -> None:
    """Takes back `fix_step`; without effect on a UNet that is not fixed."""
    fixed = getattr(unet.__dict__.get("forward"), "__self__", None)
    if isinstance(fixed, FixedStep):
        fixed.remove()


class FixedStep:
    """One UNet at one timestep with one context, while `fix_step` holds."""

    def __init__(self, unet: nn.Module, timestep: int, context: Tensor, compiled: Callable[[Forward], Forward]) -> None:
        self._unet: Any = unet
        self._timestep, self._context = timestep, context
        self._values = context.clone()  # the caller's own may be written into
        self._plain = compiled(unet.forward)
        self._layers = list(_layers(unet))
        self._seen: list[tuple[int, int]] = []
        self._running = False

    def install(self) -> None:
        """Replaces ``forward`` of the UNet and of the layers that gain by it."""
        self._unet.forward = self.forward
        for layer in self._layers:
            layer.install(lambda: self._running)

    def remove(self) -> None:
        """Puts every ``forward`` back."""
        for module in (self._unet, *(layer.module for layer in self._layers)):
            module.__dict__.pop("forward", None)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, *more: Any, **options: Any) -> Any:
        """The UNet's ``forward``."""
        known = not more and all(value is None or key in KEPT_ARGUMENTS for key, value in options.items())
        self._running = known and self._is_ours(timestep, encoder_hidden_states) and self._may_run()
        try:
            if self._running:
                self._refresh(encoder_hidden_states)
            return self._plain(sample, timestep, encoder_hidden_states, *more, **options)
        finally:
            self._running = False

    def _is_ours(self, timestep: Any, context: Tensor) -> bool:
        same = (timestep == self._timestep).all() if isinstance(timestep, Tensor) else timestep == self._timestep
        if not bool(same) or context.shape[1:] != self._context.shape[1:]:
            return False
        if context.device.type != "cpu" and _same_memory(context, self._context):
            return True  # not read back, which would wait for the device
        return bool((context == self._values.to(context.device, context.dtype)).all())

    def _may_run(self) -> bool:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._unet.parameters())
        return not trains and all(layer.is_intact() for layer in self._layers)

    @torch.no_grad()
    def _refresh(self, given: Tensor) -> None:
        """Computes the constants, if the weights are not those that they were computed from."""
        sources = [self._unet.time_embedding, *(source for layer in self._layers for source in layer.sources)]
        weights = [weight for source in sources for weight in source.parameters()]
        seen = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if seen == self._seen:
            return
        unet, context = self._unet, given[:1]
        embedding = unet.time_embedding(unet.get_time_embed(sample=context, timestep=self._timestep), None)
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        for layer in self._layers:
            layer.prepare(embedding, context)
        self._seen = seen


class _Layer(ABC):
    """A module whose ``forward`` has a short way beside the plain one."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.sources = self._find_sources()
        """The layers within, whose weights the constants depend on."""
        self._processor = getattr(module, "processor", None)
        self._plain = module.forward

    def install(self, running: Callable[[], bool]) -> None:
        """Replaces the module's ``forward``; the short way is taken while `running`."""

        def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
            return self.short(hidden) if running() else self._plain(hidden, *arguments, **options)

        self.module.forward = forward

    def is_intact(self) -> bool:
        """Whether nobody has put other layers, or another way to attend, in the place of those that were found."""
        same = all(now is then for now, then in zip(self._find_sources(), self.sources))
        return same and getattr(self.module, "processor", None) is self._processor

    def _find_sources(self) -> tuple[nn.Module, ...]:
        return ()

    @abstractmethod
    def prepare(self, embedding: Tensor, context: Tensor) -> None:
        """Computes the constants from the time embedding [1, D] and the context [1, tokens, width]."""

    @abstractmethod
    def short(self, hidden: Tensor) -> Tensor:
        """The module's result for its first argument."""


class _Residual(_Layer):
    """A ResnetBlock2D: its time projection lies in the bias of its first convolution."""

    _bias: Tensor

    def _find_sources(self) -> tuple[nn.Module, ...]:
        return self.module.time_emb_proj, self.module.conv1

    def prepare(self, embedding: Tensor, context: Tensor) -> None:
        block = self.module
        projected = block.time_emb_proj(embedding if block.skip_time_act else block.nonlinearity(embedding))
        self._bias = (block.conv1.bias.float() + projected[0].float()).to(projected.dtype)

    def short(self, hidden: Tensor) -> Tensor:
        block = self.module
        inner = block.nonlinearity(block.norm1(hidden))
        inner = block.nonlinearity(block.norm2(block.conv1._conv_forward(inner, block.conv1.weight, self._bias)))
        inner = block.conv2(block.dropout(inner))
        inner = inner + (hidden if block.conv_shortcut is None else block.conv_shortcut(hidden))
        return inner if block.output_scale_factor == 1 else inner / block.output_scale_factor


class _ToContext(_Layer):
    """An Attention to the context."""

    constant: Tensor | None = None
    """Its result [1, 1, C], where that depends on nothing else."""
    _key: Tensor
    _value: Tensor

    def _find_sources(self) -> tuple[nn.Module, ...]:
        return self.module.to_k, self.module.to_v, self.module.to_out[0]

    def prepare(self, embedding: Tensor, context: Tensor) -> None:
        attention = self.module
        value = attention.to_v(context)
        self.constant = attention.to_out[0](value) if context.shape[1] == 1 else None
        self._key, self._value = self._heads(attention.to_k(context)), self._heads(value)

    def _heads(self, projected: Tensor) -> Tensor:
        """[N, L, heads * d] as [1, heads, N * L, d]: a query sees the same context wherever it stands in the batch."""
        return rearrange(projected, "n tokens (heads d) -> 1 heads (n tokens) d", heads=self.module.heads)

    def short(self, hidden: Tensor) -> Tensor:
        if self.constant is not None:
            return self.constant  # the block adds it to its map
        attention = self.module
        found = F.scaled_dot_product_attention(self._heads(attention.to_q(hidden)), self._key, self._value)
        return attention.to_out[0](rearrange(found, "1 heads (n tokens) d -> n tokens (heads d)", n=hidden.shape[0]))


class _Norm(_Layer):
    """The norm before an attention, of no use where the attention's result does not depend on it."""

    def __init__(self, module: Any, attention: _ToContext) -> None:
        super().__init__(module)
        self._attention = attention

    def prepare(self, embedding: Tensor, context: Tensor) -> None:
        """Nothing to compute: it is left out, or runs as it is."""

    def short(self, hidden: Tensor) -> Tensor:
        return self._plain(hidden) if self._attention.constant is None else hidden


def _layers(unet: nn.Module) -> Iterator[_Layer]:
    for module in unet.modules():
        block: Any = module
        if _is_residual(block):
            yield _Residual(block)
        elif hasattr(block, "attn2") and block.norm_type == "layer_norm" and block.pos_embed is None:
            pairs = [(block.norm2, block.attn2)]
            if block.only_cross_attention:
                pairs.insert(0, (block.norm1, block.attn1))
            for norm, attention in pairs:
                if attention is not None and _is_plain_attention(attention):
                    layer = _ToContext(attention)
                    yield layer
                    if _is_plain(norm, nn.LayerNorm):
                        yield _Norm(norm, layer)


def _is_residual(block: Any) -> bool:
    return (
        getattr(block, "time_embedding_norm", None) == "default"
        and _is_plain(block.time_emb_proj, nn.Linear)
        and _is_plain(block.conv1, nn.Conv2d)
        and block.conv1.bias is not None
        and block.upsample is None
        and block.downsample is None
        and "forward" not in block.__dict__
    )


def _is_plain_attention(attention: Any) -> bool:
    return (
        type(attention.processor).__name__ in PLAIN_PROCESSORS
        and all(getattr(attention, name, None) is None for name in ABSENT)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and attention.to_out[1].p == 0
        and all(_is_plain(layer, nn.Linear) for layer in (attention.to_k, attention.to_v, attention.to_out[0]))
        and "forward" not in attention.__dict__
    )


def _is_plain(module: object, kind: type[nn.Module]) -> bool:
    """Exactly `kind`, not a layer that wraps one, and with the class's own ``forward``."""
    return type(module) is kind and "forward" not in module.__dict__


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both [N, tokens, width] show the same values because they show the same place, each N the first."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.stride()[1:] == other.stride()[1:]
        and (one.shape[0] == 1 or one.stride(0) == 0)
    )
