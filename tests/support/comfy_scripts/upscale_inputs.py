"""Sizes, masks and previews of ICMSR_Upscale with the embedded model: report.json, judged by
test_comfy_upscale_inputs.py."""

import json
import logging
from pathlib import Path

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import torch  # noqa: E402

job: Path = options.job
report: dict = {}
part = comfy_process.parts_of(pack)
upscale_module = part("nodes.upscale")
upscale_node = core.NODE_CLASS_MAPPINGS["ICMSR_Upscale"]
model, vae = core.NODE_CLASS_MAPPINGS["ICMSR_LoadEmbedded"].execute().result


class Lines(logging.Handler):
    """The texts that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


lines = Lines()
logging.getLogger().setLevel(logging.INFO)
logging.getLogger().addHandler(lines)


def upscaled(pictures: torch.Tensor, **settings) -> torch.Tensor:
    lines.texts.clear()
    return upscale_node.execute(model, vae, pictures, **{"scale": 4.0, "tile": 128, "overlap": 32, **settings}).result[
        0
    ]


def refused(pictures: torch.Tensor, **settings) -> str:
    try:
        upscaled(pictures, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


picture = torch.rand(1, 30, 40, 4, generator=torch.Generator().manual_seed(1))
rgb = picture[..., :3]


def sizes() -> None:
    """Shapes, bars and what is said, for each way to wish for a size."""
    wishes = {
        "longest": {"longest": 100},
        "shortest": {"shortest": 60},
        "megapixels": {"megapixels": 0.01},
        "crop": {"width": 64, "height": 64, "fit": "crop"},
        "pad": {"width": 64, "height": 64, "fit": "pad"},
        "stretch": {"width": 64, "height": 64},
        "beyond": {"longest": 400},
        "smaller": {"longest": 20},
    }
    found = report["sizes"] = {}
    for name, wish in wishes.items():
        result = upscaled(picture, **wish)
        found[name] = {"shape": list(result.shape), "said": [t for t in lines.texts if "ICM-SR Upscale" in t]}
        if name == "pad":
            found[name]["bars"] = [float(result[0, 0].abs().max()), float(result[0, 32, :, 3].min())]
    report["refused"] = [
        refused(rgb, longest=5, megapixels=1.0),
        refused(rgb, width=64),
        refused(rgb, mask=torch.ones(3, 4, 4)),
    ]
    adapter = core.NODE_CLASS_MAPPINGS["ICMSR_LoadAdapter"].execute(adapter="nano (embedded)").result[0]
    hint = torch.rand(1, 60, 80, 4)
    shape = upscaled(rgb, width=64, height=64, fit="crop", control_net=adapter, hint=hint).shape
    report["hint and crop"] = list(shape)


def masks() -> None:
    """A batch with masks of its own against the runs without, and what a mask of another size and an empty one do."""
    batch = torch.rand(2, 60, 80, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(2, 30, 40)
    mask[0, 10:15, 10:15] = 1
    mask[1, 15:25, 20:38] = 1
    whole, masked = upscaled(batch), upscaled(batch, mask=mask)
    said = [text for text in lines.texts if "mask" in text]
    first, second = (whole - masked).abs()
    report["masks"] = {
        "inside": [float(first[80:120, 80:120].max()), float(second[120:200, 160:304].max())],
        "outside": [float(first[160:].max()), float(second[:80].max())],
        "said": said,
        "changed": [not torch.equal(masked, whole)],
    }
    empty = upscaled(batch, mask=torch.zeros(1, 64, 64))
    report["empty mask"] = [bool(torch.equal(empty, whole)), [text for text in lines.texts if "all 0" in text]]


def previews() -> None:
    """What core's bar is given."""
    calls = []

    class Bar(upscale_module.comfy.utils.ProgressBar):
        def update_absolute(self, value, total=None, preview=None):
            shown = None if preview is None else [preview[0], list(preview[1].size), preview[1].mode, preview[2]]
            calls.append([value, total, shown])
            super().update_absolute(value, total, preview)

    original = upscale_module.comfy.utils.ProgressBar
    upscale_module.comfy.utils.ProgressBar = Bar
    try:
        upscaled(torch.rand(1, 160, 200, 3), scale=4.0, tile=512)
    finally:
        upscale_module.comfy.utils.ProgressBar = original
    report["previews"] = [shown for _, _, shown in calls if shown is not None]
    report["progress"] = [[value, total] for value, total, _ in calls if total is not None][-1]


with torch.inference_mode():
    sizes()
    masks()
    previews()
(job / "report.json").write_text(json.dumps(report, indent=1))
