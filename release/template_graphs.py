"""The graphs of `example_workflows/` and `subgraphs/`: nodes, values by name, links by the names of sockets.

`release/templates.py` draws them in ComfyUI's frontend. To change a template, change it here and run that script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

EXAMPLE = "example.png"
"""The picture that every ComfyUI has in its input folder."""
VIDEO, FOLDER = "video.mp4", "pictures"
"""What a user puts into ComfyUI's input folder: only names, to be chosen again."""
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
"""The name under which core's own examples load Stable Diffusion 1.5."""


@dataclass(frozen=True)
class Node:
    """One node of a graph."""

    name: str
    """By which `links` of other nodes call it."""
    type: str
    column: int
    """Its place from left to right; nodes of one column stand below each other, in their order here."""
    links: Mapping[str, str] = field(default_factory=dict)
    """For each connected input the output that it gets, as ``NODE.OUTPUT``."""
    values: Mapping[str, object] = field(default_factory=dict)
    """Values of widgets that are not the node's defaults."""
    title: str = ""
    box: tuple[int, int] = (300, 0)
    """Least width and height in the editor."""


@dataclass(frozen=True)
class Template:
    """A graph and its help."""

    name: str
    """Of its file, without the ending: what ComfyUI shows."""
    title: str
    """Of the note."""
    note: str
    """Markdown: what it does and what to do."""
    nodes: tuple[Node, ...]
    app: tuple[tuple[tuple[str, str], ...], tuple[str, ...]] | None = None
    """For app mode: what the user sets, as (node, widget), and the nodes whose results are shown."""
    note_height: int = 420

    def graph(self) -> dict[str, object]:
        """The graph with its note, as `tests/support/comfy_frontend.py` builds it."""
        note = Node(
            "note",
            "MarkdownNote",
            0,
            {},
            {"text": f"{unwrapped(self.note)}\n\n{HELP}\n"},
            self.title,
            (380, self.note_height),
        )
        links = []
        for node in self.nodes:
            for name, source in node.links.items():
                origin, output = source.split(".", 1)
                links.append([origin, output, node.name, name])
        described = [vars(node) | {"values": dict(node.values), "box": list(node.box)} for node in (note, *self.nodes)]
        for one in described:
            one.pop("links")
        return {"nodes": described, "links": links, "left": [40, 60], "gap": [60, 70]}


@dataclass(frozen=True)
class Blueprint:
    """A graph that is folded into one node, which the user finds in the node library."""

    name: str
    graph: Template
    """The graph with what stands around the node, so that its border gets sockets."""
    inside: tuple[str, ...]
    """The nodes that are folded."""
    widgets: tuple[tuple[str, str], ...]
    """What can be set from outside, as (node type, widget)."""
    category: str
    description: str


def _picture(column: int = 1, value: str = EXAMPLE) -> Node:
    return Node("image", "LoadImage", column, {}, {"image": value}, box=(300, 360))


def _nano(column: int = 1, generator: str = "embedded") -> Node:
    values = {} if generator == "embedded" else {"generator": generator}
    return Node("nano", "ICMSR_LoadEmbedded", column, {}, values)


def _upscale(column: int = 2, image: str = "image.IMAGE", **values: object) -> Node:
    links = {"model": "nano.MODEL", "vae": "nano.VAE", "image": image}
    return Node("upscale", "ICMSR_Upscale", column, links, values, box=(320, 0))


def _save(column: int, prefix: str = "ICM-SR", source: str = "upscale.IMAGE", name: str = "save") -> Node:
    return Node(name, "SaveImage", column, {"images": source}, {"filename_prefix": prefix}, box=(420, 340))


def _compare(column: int) -> Node:
    links = {"image_a": "image.IMAGE", "image_b": "upscale.IMAGE"}
    return Node("compare", "ImageCompare", column, links, box=(520, 460))


def _inspect(**values: object) -> Node:
    links = {name: f"nano.{name.upper()}" for name in ("model", "vae")}
    links |= {"image": "image.IMAGE", "control_net": "adapter.CONTROL_NET", "hint": "extract.hint"}
    return Node("inspect", "ICMSR_InspectManifold", 2, links, values)


HELP = "Every node has a help page: select it and press **?**."
"""The end of every note."""


def unwrapped(text: str) -> str:
    """Markdown whose paragraphs and entries of lists are one line each, as ComfyUI's notes want it."""
    return re.sub(r"(?<!\n)\n(?=[^\n])(?! *(?:- |\d\. )) *", " ", text.strip())


UPSCALE = Template(
    "upscale",
    "ICM-SR: one-step super-resolution",
    """
## Upscale a picture

1. Choose a picture in **Load Image**.
2. Press **Run**. The result is four times as wide and as high, and is saved as **ICM-SR_00001_.png**.
3. Move the pointer over **Compare Images**: left of it is your picture, right of it the result. (It needs *Nodes 2.0*,
   in the menu under the ComfyUI logo. **Save Image** shows the result anyway.)

**ICM-SR Load Embedded** loads nano, the small model inside this pack: nothing is downloaded. *fidelity* 0 is closest
to your picture, 1 has more invented detail.

**Out of memory?** Choose a smaller *tile*. **Colours are off?** Set *color_fix* to **wavelet**.
""",
    (_picture(), _nano(), _upscale(), _compare(3), _save(4)),
)

APP = Template(
    "upscale.app",
    "ICM-SR as an app",
    """
## Upscale, as an app

This is the template *upscale* in ComfyUI's app mode: it shows a picture to choose, three settings and the result.
Leave app mode in the menu beside its name to see the graph.

*scale*: how many times wider and higher. *fidelity*: 0 is closest to your picture, 1 has more invented
detail.
""",
    (_picture(), _nano(), _upscale(), _save(3)),
    app=((("image", "image"), ("upscale", "scale"), ("nano", "fidelity"), ("upscale", "color_fix")), ("save",)),
)


def _sized(name: str, **values: object) -> Node:
    links = {"model": "nano.MODEL", "vae": "nano.VAE", "image": "image.IMAGE"}
    title = "ICM-SR Upscale: " + ", ".join(f"{key} {value}" for key, value in values.items())
    return Node(name, "ICMSR_Upscale", 2, links, values, title, (360, 0))


SIZES = Template(
    "sizes_and_megapixels",
    "ICM-SR: the size you want",
    """
## The size you want

*scale* says how many times larger the result is. Instead, give one of these inputs (they are off at 0; under *Show
advanced inputs*):

- *longest* or *shortest*: that side in pixels, with the aspect of your picture,
- *megapixels*: 1 is 1024 x 1024,
- *width* with *height*: exactly this size. Where the aspect is another, *fit* says what happens: **stretch**,
  **crop** (the middle is used) or **pad** (black bars).

The three nodes here show one each; delete what you do not need, or press Ctrl+M on a node to mute it.

The model makes pictures up to 8 times as large; beyond that the result is resized, and the log says so.
""",
    (
        _picture(),
        _nano(),
        _sized("longest", longest=1536),
        _sized("megapixels", megapixels=2.0),
        _sized("exact", width=1920, height=1080, fit="crop"),
        _save(3, "ICM-SR_longest", "longest.IMAGE", "save_longest"),
        _save(3, "ICM-SR_megapixels", "megapixels.IMAGE", "save_megapixels"),
        _save(3, "ICM-SR_1920x1080", "exact.IMAGE", "save_exact"),
    ),
    note_height=520,
)

FOLDER_OF_PICTURES = Template(
    "folder",
    "ICM-SR: a folder of pictures",
    """
## A folder of pictures

1. Put the pictures into a folder inside ComfyUI's **input** folder (PNG, JPEG, WebP; any sizes), and press **R** so
   that ComfyUI sees it.
2. Choose the folder in **Load Image (from Folder)** and press **Run**.

Results are numbered, **ICM-SR_folder_00001_.png** and so on, and do not keep the files' names. Nothing is saved
before all are finished, and all results are in memory until then: *width x height x 12 bytes* of the result each (a
4096 x 4096 picture takes 0.2 GB). Opacity is dropped by the loader.

For many pictures use the command line. It keeps names, saves each at once and can continue: **icmsr upscale FOLDER
RESULTS --skip-existing**.
""",
    (
        Node("image", "LoadImageDataSetFromFolder", 1, {}, {"folder": FOLDER}),
        _nano(),
        _upscale(image="image.images"),
        _save(3, "ICM-SR_folder"),
    ),
    note_height=480,
)

VIDEO_FRAMES = Template(
    "video",
    "ICM-SR: video, frame by frame",
    """
## Video, frame by frame

1. Choose a video in **Load Video**.
2. **Trim Video** takes the first two seconds: *start_time* and *duration* choose the part.
3. Press **Run**. Sound and frame rate are kept.

**Frames are upscaled one by one and know nothing of each other**, so fine detail can flicker. What that is
on a still scene with noise: docs/performance.md, by benchmarks/flicker.py.

**Memory:** the results of all frames are in main memory at once, *frames x height x width x 12 bytes*. Five seconds
of 640 x 360 at 24 frames a second, upscaled 4 times, take 5.3 GB. So run a long video in parts, by *start_time*, and
join them afterwards (ComfyUI has a blueprint *Merge Videos*).
""",
    (
        Node("load", "LoadVideo", 1, {}, {"file": VIDEO}, box=(300, 330)),
        Node("trim", "Video Slice", 1, {"video": "load.VIDEO"}, {"duration": 2.0}),
        Node("parts", "GetVideoComponents", 1, {"video": "trim.VIDEO"}),
        _nano(),
        _upscale(image="parts.images"),
        Node("create", "CreateVideo", 3, {"images": "upscale.IMAGE", "audio": "parts.audio", "fps": "parts.fps"}),
        Node("save", "SaveVideo", 3, {"video": "create.VIDEO"}, {"filename_prefix": "video/ICM-SR"}, box=(420, 400)),
    ),
    note_height=540,
)

REGION = Template(
    "region",
    "ICM-SR: only a part",
    """
## Only a part of the picture

1. Choose a picture in **Load Image**.
2. Right-click it and choose **Open in MaskEditor**. Paint what the model shall work on, and save.
3. Press **Run**. The painted part is upscaled by the model, the rest is resized, and the two blend over 32 pixels.

Without anything painted the whole picture is upscaled, and the log says so.

Tiles outside of the mask do not run. Above 2048 x 2048 pixels the VAE does not run there either. Any MASK will do, of
any size: 1 means work here.
""",
    (
        _picture(),
        _nano(),
        Node(
            "upscale",
            "ICMSR_Upscale",
            2,
            {"model": "nano.MODEL", "vae": "nano.VAE", "image": "image.IMAGE", "mask": "image.MASK"},
            box=(320, 0),
        ),
        _compare(3),
        _save(4, "ICM-SR_region"),
    ),
)

CONDITIONS = Template(
    "conditions",
    "ICM-SR: colours and edges",
    """
## Colours and edges

In training, ICM-SR's teacher sees a *condition*: the coarse colours and the edges of the true picture. **ICM-SR
Extract Condition** makes both. Lower thresholds give more edges.

- *colormap* and *edges* are ordinary pictures, shown on the right.
- *hint* holds both in 4 channels. With an adapter from **ICM-SR Load Adapter** it guides a model. **ICM-SR Inspect
  Manifold** shows how well: each picture is made from noise, without the condition and with it. The dB numbers say
  how close it is to your picture; higher is closer.

At timestep 999 hardly anything of the picture is left but the condition.

Upscaling itself needs no condition: the generators have never seen one.
""",
    (
        _picture(),
        _nano(generator="none"),
        Node("adapter", "ICMSR_LoadAdapter", 1),
        Node(
            "extract",
            "ICMSR_ExtractCondition",
            2,
            {"image": "image.IMAGE"},
            {"low_threshold": 60.0, "high_threshold": 160.0},
        ),
        _inspect(timesteps="600, 999"),
        Node("colormap", "PreviewImage", 3, {"images": "extract.colormap"}, title="Colormap", box=(300, 300)),
        Node("edges", "PreviewImage", 3, {"images": "extract.edges"}, title="Edges", box=(300, 300)),
        _save(4, "ICM-SR_conditions", "inspect.IMAGE"),
    ),
    note_height=520,
)

OWN_GENERATOR = Template(
    "own_generator",
    "ICM-SR: a generator of your own",
    """
## A generator of your own

1. Put the file that training has written (**generator.safetensors**) into **models/icmsr**, and press **R** so that
   ComfyUI sees it.
2. Choose it in **ICM-SR Apply Generator**. Until then the embedded one is chosen, so this graph runs as it is.
3. Press **Run**.

A generator fits the base that it was trained on. For one on nano, **ICM-SR Load Embedded** with *generator* **none**
is the base. For one on Stable Diffusion 1.5 or 2.1, take **Load Checkpoint** instead and connect its MODEL and VAE. A
wrong pair is an error that names both.

How to train one: **docs/training.md** in the pack's repository.
""",
    (
        _picture(),
        Node("base", "ICMSR_LoadEmbedded", 1, {}, {"generator": "none"}),
        Node("nano", "ICMSR_ApplyGenerator", 2, {"model": "base.MODEL", "vae": "base.VAE"}),
        _upscale(3),
        _compare(4),
        _save(5, "ICM-SR_own"),
    ),
    note_height=480,
)

AFTER_STABLE_DIFFUSION = Template(
    "after_text_to_image",
    "ICM-SR after Stable Diffusion",
    """
## Text to image, then larger

A Stable Diffusion graph as you know it; its picture goes through **ICM-SR Upscale** before it is saved. Four times
512 x 512 is 2048 x 2048.

1. Choose a checkpoint in **Load Checkpoint**; any model that ComfyUI can sample will do. It is not part of this pack.
2. Write a prompt and press **Run**.

To put ICM-SR into a graph of your own: connect the IMAGE of VAE Decode to *image*, and the MODEL and VAE of **ICM-SR
Load Embedded**. The MODEL and VAE of the checkpoint do not upscale: they have no generator.
""",
    (
        Node("checkpoint", "CheckpointLoaderSimple", 1, {}, {"ckpt_name": CHECKPOINT}),
        Node("size", "EmptyLatentImage", 1),
        _nano(1),
        Node(
            "positive",
            "CLIPTextEncode",
            2,
            {"clip": "checkpoint.CLIP"},
            {"text": "a lighthouse on a rocky coast in evening light, photograph"},
            box=(380, 180),
        ),
        Node("negative", "CLIPTextEncode", 2, {"clip": "checkpoint.CLIP"}, {"text": "blurry, drawing"}, box=(380, 140)),
        Node(
            "sample",
            "KSampler",
            3,
            {
                "model": "checkpoint.MODEL",
                "positive": "positive.CONDITIONING",
                "negative": "negative.CONDITIONING",
                "latent_image": "size.LATENT",
            },
        ),
        Node("decode", "VAEDecode", 3, {"samples": "sample.LATENT", "vae": "checkpoint.VAE"}),
        _upscale(4, "decode.IMAGE"),
        Node(
            "compare",
            "ImageCompare",
            5,
            {"image_a": "decode.IMAGE", "image_b": "upscale.IMAGE"},
            box=(520, 460),
        ),
        _save(6, "ICM-SR_text_to_image"),
    ),
    note_height=440,
)

INSPECT_MANIFOLD = Template(
    "inspect_manifold",
    "What the model sees",
    """
## What the model sees

ICM-SR trains its upscalers with the help of an ordinary diffusion model. This graph adds noise to a picture, at three
levels, and shows what that model makes of it: without an adapter, and with one that sees the colours and edges of the
picture. Upscaling needs none of this.

1. Choose a sharp picture in **Load Image**.
2. Press **Run**. The grid is saved as **ICM-SR_manifold_00001_.png**.

Higher *timesteps* (up to 999) mean more noise. For another model, connect Load Checkpoint, an adapter made for it,
and an empty prompt from CLIP Text Encode.
""",
    (
        _picture(),
        _nano(generator="none"),
        Node("adapter", "ICMSR_LoadAdapter", 1),
        Node("extract", "ICMSR_ExtractCondition", 2, {"image": "image.IMAGE"}),
        _inspect(),
        _save(3, "ICM-SR_manifold", "inspect.IMAGE"),
    ),
)

TEMPLATES = (
    UPSCALE,
    APP,
    SIZES,
    FOLDER_OF_PICTURES,
    VIDEO_FRAMES,
    REGION,
    CONDITIONS,
    OWN_GENERATOR,
    AFTER_STABLE_DIFFUSION,
    INSPECT_MANIFOLD,
)

BLUEPRINT = Blueprint(
    "Upscale (ICM-SR)",
    Template("blueprint", "", "", (_picture(), _nano(2), _upscale(), _save(3))),
    ("nano", "upscale"),
    (
        ("ICMSR_Upscale", "scale"),
        ("ICMSR_Upscale", "megapixels"),
        ("ICMSR_Upscale", "color_fix"),
        ("ICMSR_LoadEmbedded", "fidelity"),
    ),
    "Image generation and editing/Upscale",
    "Makes pictures larger and clearer in one diffusion step, with nano, the model inside the ICM-SR pack.",
)
