"""The list of nodes that ComfyUI registers."""

from comfy_api.latest import ComfyExtension, io

from .conditions import ExtractCondition
from .inspect_manifold import InspectManifold
from .loaders import ApplyGenerator, LoadAdapter, LoadEmbedded
from .native.folders import register_folder
from .upscale import Upscale


class IcmsrExtension(ComfyExtension):
    """Everything ICM-SR adds to ComfyUI."""

    async def on_load(self) -> None:
        register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadEmbedded, ApplyGenerator, LoadAdapter, ExtractCondition, Upscale, InspectManifold]
