"""Loads T2I-Adapters of every public layout as core's CONTROL_NET."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import comfy.controlnet
import comfy.t2i_adapter.adapter
import folder_paths
from torch import Tensor, nn

from ...icmsr_core.errors import IcmsrError
from ...icmsr_core.weights.adapter_layouts import ADAPTER_EXTENSIONS, AdapterLayout, read_adapter
from ...icmsr_core.weights.diffusers_folder import CONFIG_FILE
from ...icmsr_core.weights.embedded import embedded_adapter
from .folders import EMBEDDED, FOLDER, file_stamp, find_file

ADAPTER_FOLDERS = (FOLDER, "controlnet")
HINT_CHANNELS = 4
"""Channels of ICM-SR's hint: the RGB colormap, then the edges."""
MOST_LEVELS = 4
"""Most levels of core's full adapter: further ones would have the size of the fourth."""


class HintNetwork(nn.Module):
    """The network in core's T2IAdapter: one adapter or two, each with its channels of the hint; features are summed.

    Both have the weight 1, as the authors of the public pair use them (diffusers' MultiAdapter would average).
    """

    def __init__(self, networks: Iterable[nn.Module], taken: tuple[int, ...], layout: AdapterLayout) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.taken = taken
        self.unshuffle_amount = layout.factor  # core rounds the size of a hint up to a multiple of it
        self.channels = list(layout.widths)

    def accepts(self) -> tuple[int, ...]:
        """The numbers of channels that a hint may have."""
        if len(self.taken) > 1:
            return (HINT_CHANNELS,)
        return {1: (1, 3, HINT_CHANNELS), 3: (3, HINT_CHANNELS)}.get(self.taken[0], self.taken)

    def forward(self, hint: Tensor) -> dict[str, list[Tensor | None]]:
        """The features of `hint` [N, C, H, W] in [0, 1], in core's form. Raises `IcmsrError` for a wrong number C."""
        if hint.shape[1] not in self.accepts():
            raise wrong_channels(hint.shape[1], self.accepts())
        total: list[Tensor | None] = []
        for network, taken in zip(self.networks, self.taken):
            features = network(_channels(hint, taken))["input"]
            total = [a if a is None else a + b for a, b in zip(total, features)] if total else features
        return {"input": total}


def _channels(hint: Tensor, taken: int) -> Tensor:
    """The channels of `hint` for an adapter that takes `taken`: 3 are the colours, 1 is the edges."""
    if hint.shape[1] == taken:
        return hint
    if taken == 3:
        return hint[:, :3]
    # Edges as a picture have three equal channels; core takes their mean too.
    return hint[:, 3:4] if hint.shape[1] == HINT_CHANNELS else hint.mean(1, keepdim=True)


def wrong_channels(got: int, accepted: tuple[int, ...]) -> IcmsrError:
    """The error for a hint with a number of channels that an adapter does not accept."""
    return IcmsrError(
        f"hint has {got} channels, this control_net takes {' or '.join(map(str, accepted))}: connect the output called "
        "hint of ICM-SR Extract Condition"
    )


def load_control_net(path: Path, second: Path | None = None) -> comfy.controlnet.T2IAdapter:
    """The CONTROL_NET in `path`, or the pair of a colour and an edge adapter in `path` and `second`, in any order.

    Core's own loader silently takes an adapter with 4 x 64 input channels for one of SDXL, assumes one downscale factor
    and the widths of Stable Diffusion, and does not read diffusers' light adapters. Raises `IcmsrError` for what
    `read_adapter` refuses, for tensors that do not fit, and for two adapters that do not make a pair.
    """
    paths = [path] if second is None else [path, second]
    read = [read_adapter(one) for one in paths]
    layouts = [layout for layout, _ in read]
    taken = tuple(layout.channels_in for layout in layouts)
    if second is not None and sorted(taken) != [1, 3]:
        raise IcmsrError(
            f"a pair needs one adapter for colours (3 channels) and one for edges (1 channel), got {taken[0]} and "
            f"{taken[1]} channels: set second_adapter to none, or choose such a pair"
        )
    if len({(layout.factor, layout.widths) for layout in layouts}) > 1:
        described = " and ".join(f"{list(layout.widths)} at factor {layout.factor}" for layout in layouts)
        raise IcmsrError(
            f"the two adapters are for different base models (widths {described}): choose two for the same one"
        )
    networks = [_network(one, *parts) for one, parts in zip(paths, read)]
    return comfy.controlnet.T2IAdapter(
        HintNetwork(networks, taken, layouts[0]),
        # With 1, core would average the channels of the hint; here the network chooses among them.
        channels_in=max(3, sum(taken)),
        compression_ratio=layouts[0].factor,
        upscale_algorithm="nearest-exact",
    )


def _network(path: Path, layout: AdapterLayout, tensors: dict[str, Tensor]) -> nn.Module:
    """Core's adapter of `layout` with the weights `tensors`, read from `path`."""
    unshuffled, widths = layout.channels_in * layout.factor**2, list(layout.widths)
    network: nn.Module
    if layout.light:
        network = comfy.t2i_adapter.adapter.Adapter_light(cin=unshuffled, channels=widths, nums_rb=layout.blocks)
    elif len(widths) > MOST_LEVELS:
        raise IcmsrError(f"{path}: ComfyUI's full adapter has at most {MOST_LEVELS} levels, this one has {len(widths)}")
    else:
        network = comfy.t2i_adapter.adapter.Adapter(
            cin=unshuffled,
            channels=widths,
            nums_rb=layout.blocks,
            ksize=layout.kernel,
            sk=True,
            use_conv=layout.convolved,
            xl=False,
        )
    network.unshuffle = nn.PixelUnshuffle(layout.factor)  # core builds 8
    network.unshuffle_amount, network.input_channels = layout.factor, layout.channels_in
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise IcmsrError(f"{path}: damaged adapter: {' '.join(str(error).split())}") from error
    return network.requires_grad_(False).eval()


def list_adapters() -> list[str]:
    """The embedded adapter, then the files of models/icmsr and models/controlnet that may be adapters, each once."""
    names = [name for folder in ADAPTER_FOLDERS for name in folder_paths.get_filename_list(folder)]
    return [EMBEDDED, *(name for name in dict.fromkeys(names) if name.endswith(ADAPTER_EXTENSIONS))]


def find_adapter(name: str) -> Path:
    """Path of the adapter file called `name`. Raises `IcmsrError` if there is none."""
    return embedded_adapter() if name == EMBEDDED else find_file(name, *ADAPTER_FOLDERS)


def adapter_stamp(name: str) -> str:
    """A text that changes when the file called `name`, or the config.json in its folder, is replaced."""
    path = find_adapter(name)
    config = path.parent / CONFIG_FILE
    return file_stamp(path) + (file_stamp(config) if config.is_file() else "")
