"""Computes once what never changes in a one-step generator: all that timestep and context alone decide (ours).

A generator runs a UNet2DConditionModel at one timestep with one context, for every picture and every tile. Therefore

- the projection of the time embedding in each residual block is a constant vector: it is added to the bias of the
  convolution before it, which saves the projection and a pass over the map;
- so are the sines and cosines that it is made of, and no number has to be copied to the device for each call;
- keys and values of every attention to the context are constants, the same for all pictures of a batch;
- with a context of ONE token the softmax is 1 for any query, so the result of the attention is the constant
  to_out(to_v(context)): the query, the attention, the norm before it and the projection after it are skipped, exactly.

Modules keep their parameters and names; only ``forward`` is replaced, on the instance. The layers are recognised by
their attributes, so this module does not import diffusers.
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
"""diffusers' plain attention; other processors, such as an IP-Adapter's, read more than the context."""
ABSENT = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
"""Options of diffusers' Attention that Stable Diffusion's UNets do not use."""
KEPT_ARGUMENTS = (
    "down_intrablock_additional_residuals",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "return_dict",
)
"""Arguments that do not touch the constants. A call with any other argument runs the plain UNet."""
OTHER_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
    "dual_cross_attention",
)
"""Configuration entries of UNets with inputs besides sample, timestep and context."""


Forward = Callable[..., Any]


def fix_step(
    unet: nn.Module, timestep: int, context: Tensor, compiled: Callable[[Forward], Forward] | None = None
) -> None:
    """Makes `unet` (diffusers' UNet2DConditionModel) compute everything that depends on these two alone only once.

    `context` is [tokens, width] or [1, tokens, width]. Later calls with this timestep and context, at any batch size,
    give the plain UNet's result up to rounding (float32: 1e-5 of the output's scale); residuals of a T2I-Adapter or a
    ControlNet may be passed. All other calls run the plain UNet: another timestep or context, masks,
    `cross_attention_kwargs`, or gradients for the weights.

    Weights may be changed, cast or moved: the constants are computed again (only a write into a weight's ``.data`` goes
    unnoticed). Layers other than plain convolutions and linear layers (unmerged LoRA) stay as they are; when a layer is
    replaced later, every call runs the plain UNet. On an accelerator, pass the timestep as an int and a view of this
    same `context`: anything else has to be read back first. `compiled` maps the UNet's forward to a compiled one; the
    comparisons between calls stay outside of it. `release_step` undoes all this; call it before copying the module.

    Raises `IcmsrError` for a context that does not fit, and for a UNet with more inputs than sample, timestep and
    context.
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
    """Undoes `fix_step`; does nothing to a UNet that is not fixed."""
    fixed = getattr(unet.__dict__.get("forward"), "__self__", None)
    if isinstance(fixed, FixedStep):
        fixed.remove()


class FixedStep:
    """The state of one UNet between `fix_step` and `release_step`."""

    def __init__(self, unet: nn.Module, timestep: int, context: Tensor, compiled: Callable[[Forward], Forward]) -> None:
        self._unet: Any = unet
        self._timestep, self._context = timestep, context
        self._values = context.clone()  # the caller may write into its own
        self._plain = compiled(unet.forward)
        self._embed: Any = unet.get_time_embed
        self._embedded: Tensor | None = None
        """The timestep's sines and cosines [1, D]."""
        self._layers = list(_layers(unet))
        self._seen: list[tuple[int, int]] = []
        self._running = False

    def install(self) -> None:
        """Replaces ``forward`` of the UNet and of the layers with constants."""
        self._unet.forward = self.forward
        self._unet.get_time_embed = self.embedded
        for layer in self._layers:
            layer.install(lambda: self._running)

    def remove(self) -> None:
        """Restores every ``forward``."""
        self._unet.__dict__.pop("get_time_embed", None)
        for module in (self._unet, *(layer.module for layer in self._layers)):
            module.__dict__.pop("forward", None)

    def embedded(self, sample: Tensor, timestep: Any) -> Any:
        """The UNet's ``get_time_embed``, which would copy the number to the device, and wait, at each call."""
        return self._embedded if self._running else self._embed(sample=sample, timestep=timestep)

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
            return True  # comparing values would wait for the device
        return bool((context == self._values.to(context.device, context.dtype)).all())

    def _may_run(self) -> bool:
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._unet.parameters())
        return not trains and all(layer.is_intact() for layer in self._layers)

    @torch.no_grad()
    def _refresh(self, given: Tensor) -> None:
        """Computes the constants unless the weights are those that they were computed from."""
        sources = [self._unet.time_embedding, *(source for layer in self._layers for source in layer.sources)]
        weights = [weight for source in sources for weight in source.parameters()]
        seen = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if seen == self._seen:
            return
        unet, context = self._unet, given[:1]
        self._embedded = self._embed(sample=context, timestep=self._timestep)
        embedding = unet.time_embedding(self._embedded, None)
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        for layer in self._layers:
            layer.prepare(embedding, context)
        self._seen = seen


class _Layer(ABC):
    """A module with a shorter ``forward`` for the fixed step."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.sources = self._find_sources()
        """The layers inside it whose weights the constants depend on."""
        self._processor = getattr(module, "processor", None)
        self._plain = module.forward

    def install(self, running: Callable[[], bool]) -> None:
        """Replaces the module's ``forward``: it calls `short` while `running` returns true."""

        def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
            return self.short(hidden) if running() else self._plain(hidden, *arguments, **options)

        self.module.forward = forward

    def is_intact(self) -> bool:
        """Whether its layers and its attention processor are still those that were found."""
        same = all(now is then for now, then in zip(self._find_sources(), self.sources))
        return same and getattr(self.module, "processor", None) is self._processor

    def _find_sources(self) -> tuple[nn.Module, ...]:
        return ()

    @abstractmethod
    def prepare(self, embedding: Tensor, context: Tensor) -> None:
        """Computes the constants from the time embedding [1, D] and the context [1, tokens, width]."""

    @abstractmethod
    def short(self, hidden: Tensor) -> Tensor:
        """The module's result for its first argument, from the constants."""


class _Residual(_Layer):
    """A ResnetBlock2D: the time projection is added to the bias of its first convolution."""

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
    """Its result [1, 1, C] for a context of one token; None for longer ones."""
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
        """[N, L, heads * d] as [1, heads, N * L, d]: all queries of a batch see the same context."""
        return rearrange(projected, "n tokens (heads d) -> 1 heads (n tokens) d", heads=self.module.heads)

    def short(self, hidden: Tensor) -> Tensor:
        if self.constant is not None:
            return self.constant  # the block adds it to its map
        attention = self.module
        found = F.scaled_dot_product_attention(self._heads(attention.to_q(hidden)), self._key, self._value)
        return attention.to_out[0](rearrange(found, "1 heads (n tokens) d -> n tokens (heads d)", n=hidden.shape[0]))


class _Norm(_Layer):
    """The norm before an attention, skipped when the result of the attention is a constant."""

    def __init__(self, module: Any, attention: _ToContext) -> None:
        super().__init__(module)
        self._attention = attention

    def prepare(self, embedding: Tensor, context: Tensor) -> None:
        """Nothing to compute: the norm is skipped, or runs unchanged."""

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
    """Whether `module` is exactly a `kind`, not a wrapper, and still has the ``forward`` of its class."""
    return type(module) is kind and "forward" not in module.__dict__


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both contexts [N, tokens, width] are views of the same memory, repeated along N."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.stride()[1:] == other.stride()[1:]
        and (one.shape[0] == 1 or one.stride(0) == 0)
    )
