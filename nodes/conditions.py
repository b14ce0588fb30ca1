"""The node that extracts coarse colours and edges from a picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..icmsr_core.pictures.channels import as_rgb
from .category import CATEGORY
from .native.sockets import check_image, check_values, to_image, to_pictures


class ExtractCondition(io.ComfyNode):
    """Colours and edges of a picture, together and as pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ICMSR_ExtractCondition",
            display_name="ICM-SR Extract Condition",
            category=CATEGORY,
            description=(
                "Extracts the coarse colours and the edges of a picture. With an adapter from ICM-SR Load Adapter they "
                "guide the model."
            ),
            search_aliases=["colormap", "canny", "hint", "preprocessor"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="The picture to read colours and edges from. Best at the size of the result."
                ),
                io.Float.Input(
                    "low_threshold",
                    default=100.0,
                    min=0.0,
                    max=2040.0,
                    step=1.0,
                    tooltip=(
                        "Edges continue where the picture changes by more than this. A lower value gives longer edges. "
                        "Must not be above high_threshold."
                    ),
                ),
                io.Float.Input(
                    "high_threshold",
                    default=200.0,
                    min=0.0,
                    max=2040.0,
                    step=1.0,
                    tooltip="Edges start where the picture changes by more than this. A lower value gives more edges.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="hint",
                    tooltip=(
                        "Colours and edges together, in 4 channels. Connect it to an input called hint, or to the "
                        "image of Apply ControlNet. It cannot be previewed."
                    ),
                ),
                io.Image.Output(
                    display_name="colormap", tooltip="The coarse colours as a picture: one for every 64 x 64 pixels."
                ),
                io.Image.Output(display_name="edges", tooltip="The edges as a picture, white on black."),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, low_threshold: float = 100.0, high_threshold: float = 200.0) -> io.NodeOutput:
        from ..icmsr_core.conditions import canny_edges, colormap  # imports OpenCV, so only when it is needed

        check_image("image", image)
        check_values("image", image)
        pictures = to_pictures(image)
        edges = canny_edges(pictures, low_threshold, high_threshold)
        colours = colormap(pictures)
        return io.NodeOutput(to_image(torch.cat([colours, edges], dim=1)), to_image(colours), to_image(as_rgb(edges)))
