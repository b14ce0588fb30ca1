"""The node that shows and hands out the structural condition."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..icmsr_core.pictures.channels import as_rgb
from .category import CATEGORY
from .native.sockets import to_image, to_pictures


class ExtractCondition(io.ComfyNode):
    """Colormap and edges of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_ExtractCondition",
            display_name="ICM-SR Extract Condition",
            category=CATEGORY,
            description="The sparse structure of a picture that ICM-SR conditions on: coarse colours and Canny edges.",
            search_aliases=["colormap", "canny", "hint", "preprocessor"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to take the structure from, best at the result's size."),
                io.Float.Input(
                    "low_threshold",
                    default=100.0,
                    min=0.0,
                    max=2040.0,
                    step=1.0,
                    tooltip="Canny: an edge goes on where the gradient is above this (grey levels).",
                ),
                io.Float.Input(
                    "high_threshold",
                    default=200.0,
                    min=0.0,
                    max=2040.0,
                    step=1.0,
                    tooltip="Canny: an edge starts where the gradient is above this. Not below low_threshold.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="hint",
                    tooltip="4 channels: the colormap's RGB and the edges. For ICM-SR Upscale or Apply ControlNet.",
                ),
                io.Image.Output(display_name="colormap", tooltip="One colour for every 64 x 64 pixels, as a picture."),
                io.Image.Output(display_name="edges", tooltip="The edges in white on black, as a picture."),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, low_threshold: float = 100.0, high_threshold: float = 200.0) -> io.NodeOutput:
        from ..icmsr_core.conditions import canny_edges, colormap  # OpenCV, only once it is needed

        pictures = to_pictures(image)
        edges = canny_edges(pictures, low_threshold, high_threshold)
        colours = colormap(pictures)
        return io.NodeOutput(to_image(torch.cat([colours, edges], dim=1)), to_image(colours), to_image(as_rgb(edges)))
