"""Runs random graphs on one real ComfyUI process and compares every result with the library's.

    python -m tests.campaign.graphs --graphs 500 --prompts 500 --seed 0 --minutes 110 --side 64

A graph has random widgets, one to three pictures of up to `--side` pixels (in one of twelve graphs twice that), and one
of three models; one in five has a mask, one in three a wish for a size instead of a scale. In one of six runs it is
interrupted at a random time, in one of six memory runs out one to three times in it. Damaged prompts are posted in
between. A finding is: a result of which a value is over 1/255 from the library's with the tile that was used in the
end; another patch, option or hook on MODEL or VAE than before; a lack of memory that no pass met, or that was given up
while a plan was left to try; an interrupted run that ends otherwise; a prompt that is answered with anything but an id
or a refusal, or in which one of our nodes ends in another error than one in words; an end of the process; the first ten
graphs, run again at the end, with other results or over 50 MB more memory than at first; memory that grows by over
50 MB over the last half of the runs. Torch keeps kernels of its own for every new size of a map, so memory does grow
with the number of graphs that differ. With `--distinct 12` the others repeat twelve, and it must not grow; nor must it,
whatever the number, under ONEDNN_PRIMITIVE_CACHE_CAPACITY=4 MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=65536.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from icmsr_core.runtime.diffusers_backbone import DiffusersBackbone, load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.upscale.framing import FITS
from icmsr_core.upscale.one_step import run_plan
from icmsr_core.upscale.out_of_memory import retries_of
from icmsr_core.upscale.plan import plan_upscale
from icmsr_core.upscale.settings import COLOR_FIXES, VAE_MODES, UpscaleSettings
from icmsr_core.weights.embedded import embedded_base, embedded_generator
from tests.campaign.mutation import mutated_json
from tests.support.comfy_harness import Server, find_comfyui, prepare_python
from tests.support.model_files import write_generator

MODELS = ("embedded", "a.safetensors", "b.safetensors")
CLOSE = 1 / 255
IN_WORDS = ("IcmsrError", "TooLittleMemory")
"""Exceptions whose text is meant for users."""
FIRST = 10
"""Graphs that are run again at the end."""
GROWTH = 50 << 20
"""Bytes of memory that count as growth."""


@dataclass
class Report:
    """What came of the campaign."""

    counts: Counter[str] = field(default_factory=Counter)
    """Runs by their kind and end; damaged prompts by theirs."""
    compared: int = 0
    """Pictures compared with the library's."""
    findings: list[dict[str, Any]] = field(default_factory=list)
    furthest: float = 0.0
    """Largest difference of a value from the library's."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes of the server after each graph."""
    first: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    """The same after the first ten graphs, and after the same ten at the end."""


@dataclass(frozen=True)
class Graph:
    """One random graph."""

    number: int
    model: str
    sizes: tuple[int, int, int]
    """Pictures, height, width."""
    settings: UpscaleSettings
    tile_batch: int
    kind: str
    errors: int = 0
    """Times that memory runs out."""
    delay: float = 0.0
    """Seconds after which it is interrupted."""
    masked: bool = False

    def picture(self) -> np.ndarray:
        """The pictures, uint8 [count, height, width, 3]."""
        count, height, width = self.sizes
        numbers = np.random.default_rng(self.number)
        coarse = numbers.integers(0, 256, (count, 5, 5, 3), np.uint8)
        whole = [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in coarse]
        return np.stack([np.asarray(one) for one in whole])

    def mask(self) -> np.ndarray:
        """A rectangle of 255 in 0, uint8 [height, width], in a size of its own."""
        numbers = np.random.default_rng(self.number)
        mask = np.zeros((24, 32), np.uint8)
        top, left = numbers.integers(0, 20, 2)
        mask[top : top + numbers.integers(1, 24), left : left + numbers.integers(1, 32)] = 255
        return mask


def random_graph(random: Random, number: int, side: int) -> Graph:
    """Widgets as a user may set them, such that the graph is valid."""
    tile = random.choice((0, 64, 128, 256, 512))
    overlap = random.choice((0, 16, tile // 4)) if tile else 0
    side *= 2 if random.random() < 1 / 12 else 1
    settings = UpscaleSettings(
        **_size(random, side),
        tile=tile,
        overlap=overlap,
        color_fix=random.choice(COLOR_FIXES),
        vae=random.choice(VAE_MODES),
    )
    sizes = random.choice((1, 1, 1, 2, 3)), random.randint(8, side), random.randint(8, side)
    kind = random.choice(("plain",) * 4 + ("out of memory", "interrupted"))
    return Graph(
        number,
        random.choice(MODELS),
        sizes,
        settings,
        random.choice((0, 1, 1, 4)),
        kind,
        errors=random.randint(1, 3) if kind == "out of memory" else 0,
        delay=random.uniform(0, 2) ** 2,
        masked=random.random() < 0.2,
    )


def _size(random: Random, side: int) -> dict[str, Any]:
    """Settings for the size of the result."""

    def pixels() -> int:
        return random.randint(4, 4 * side)

    wishes: tuple[dict[str, Any], ...] = (
        {"longest": pixels()},
        {"shortest": random.randint(4, 2 * side)},
        {"size": (pixels(), pixels()), "fit": random.choice(FITS)},
    )
    return (
        random.choice(wishes) if random.random() < 1 / 3 else {"scale": random.choice((1.0, 1.5, 2.0, 3.0, 4.0, 4.0))}
    )


def prompt_of(graph: Graph, images: list[str], mask: str = "") -> dict[str, Any]:
    """`graph` in the form that POST /prompt takes; `images` and `mask` are the names of the uploaded pictures."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    prompt = {f"image{index}": node("LoadImage", image=name) for index, name in enumerate(images)}
    last = "image0"
    for index in range(1, len(images)):
        prompt[f"batch{index}"] = node("ImageBatch", image1=[last, 0], image2=[f"image{index}", 0])
        last = f"batch{index}"
    if graph.model == "embedded":
        prompt["model"] = node("ICMSR_LoadEmbedded", generator="embedded")
    else:
        prompt["base"] = node("ICMSR_LoadEmbedded", generator="none")
        prompt["model"] = node(
            "ICMSR_ApplyGenerator", model=["base", 0], vae=["base", 1], generator=graph.model, strength=1.0
        )
    originals = {"model": ["model", 0], "vae": ["model", 1]}
    prompt["plant"] = node("CampaignPlant", images=[last, 0], errors=graph.errors, run=graph.number, **originals)
    own = graph.settings
    optional: dict[str, Any] = {name: getattr(own, name) for name in ("longest", "shortest") if getattr(own, name)}
    if own.size is not None:
        optional |= {"width": own.size[0], "height": own.size[1], "fit": own.fit}
    if graph.masked:
        prompt["mask"] = node("LoadImageMask", image=mask, channel="red")
        optional["mask"] = ["mask", 0]
    prompt["upscale"] = node(
        "ICMSR_Upscale",
        **originals,
        image=["plant", 0],
        scale=own.scale,
        tile=own.tile,
        overlap=own.overlap,
        color_fix=own.color_fix,
        tile_batch=graph.tile_batch,
        vae_mode=own.vae,
        **optional,
    )
    prompt["keep"] = node("CampaignKeep", images=["upscale", 0], run=graph.number, **originals)
    return prompt


class Campaign:
    """A running server, the library's networks, and what was found so far."""

    def __init__(self, server: Server, folder: Path, seed: int) -> None:
        self.server, self.seed, self.report = server, seed, Report()
        self._folder = folder
        self._backbones: dict[str, DiffusersBackbone] = {}

    def run(self, graph: Graph, repeated: bool = False) -> np.ndarray | None:
        """Runs `graph`, compares its result, and returns it; None where it has none."""
        try:
            result, end = self._run(graph, repeated)
        except Exception as error:  # a refusal, no answer, no file: all of them findings
            self.find(graph, f"{type(error).__name__}: {error}")
            result, end = None, "failed"
        self.report.counts[f"{graph.kind}: {end}"] += 1
        if self.server.alive:
            self.report.memory.append(self.resident())
        return result

    def _run(self, graph: Graph, repeated: bool) -> tuple[np.ndarray | None, str]:
        pictures = graph.picture()
        names = [
            self.server.upload(Image.fromarray(one), f"{graph.number}_{index}.png")
            for index, one in enumerate(pictures)
        ]
        mask = self.server.upload(Image.fromarray(graph.mask()), f"{graph.number}_m.png") if graph.masked else ""
        prompt = prompt_of(graph, names, mask)
        if repeated:  # else core gives what it remembers
            prompt["plant"]["inputs"]["run"] = prompt["keep"]["inputs"]["run"] = graph.number + 1_000_000
        if graph.kind == "interrupted":
            queued = self.server.post("/prompt", {"prompt": prompt})
            time.sleep(graph.delay)
            self.server.post("/interrupt", {})
            status, error = self._end_of(queued["prompt_id"])
            if status == "interrupted":
                return None, "interrupted"
            if status != "success":
                self.find(graph, f"an interrupted run ended with {status}: {json.dumps(error)[:1500]}")
                return None, "failed"
        else:
            kind, data, _ = self.server.run(prompt, timeout=600)
            if kind != "execution_success":
                if graph.errors and data.get("exception_message", "").startswith("out of memory with "):
                    return None, self._given_up(graph)
                self.find(graph, f"{kind}: {json.dumps(data)[:1500]}")
                return None, "failed"
        return self._compare(graph, pictures, prompt["keep"]["inputs"]["run"]), "compared"

    def _end_of(self, prompt: str) -> tuple[str, dict[str, Any]]:
        """How a prompt ended, and the data of its error if there is one."""
        for _ in range(3000):
            history = self.server.get(f"/history/{prompt}")
            if prompt in history:
                messages = dict(history[prompt]["status"]["messages"])
                ended = (
                    "interrupted" if "execution_interrupted" in messages else history[prompt]["status"]["status_str"]
                )
                return ended, messages.get("execution_error", {})
            time.sleep(0.1)
        return "nothing after five minutes", {}

    def _given_up(self, graph: Graph) -> str:
        """Whether the node could only give up: memory ran out with every plan that there is."""
        descriptor = self._backbone(graph.model).descriptor
        settings = replace(graph.settings, batch=graph.tile_batch or 1)
        left = len(list(retries_of(descriptor, plan_upscale(descriptor, *graph.sizes[1:], settings))))
        if left >= graph.errors:
            self.find(graph, f"gave up after {graph.errors} lacks of memory, of {left} further plans")
        return "no plan was left"

    def _compare(self, graph: Graph, pictures: np.ndarray, run: int) -> np.ndarray:
        path = self.server.base / "output" / f"run_{run}.safetensors"
        with safe_open(str(path), framework="pt") as file:
            found, told = file.get_tensor("images"), json.loads(file.metadata()["told"])
        path.unlink()
        mask = torch.from_numpy(graph.mask())[None, None].float() / 255 if graph.masked else None
        backbone = self._backbone(graph.model)
        for index, (one, used) in enumerate(zip(pictures, told["plans"])):
            settings = replace(graph.settings, **used)
            image = torch.from_numpy(one.copy()).movedim(-1, 0)[None].float() / 255
            plan = plan_upscale(backbone.descriptor, *graph.sizes[1:], settings)
            wanted = run_plan(backbone, image, plan, mask=mask)[0].movedim(0, -1)
            if wanted.shape != found[index].shape:
                self.find(graph, f"picture {index} is {list(found[index].shape)}, expected {list(wanted.shape)}")
                continue
            apart = float((wanted - found[index]).abs().max())
            self.report.compared += 1
            self.report.furthest = max(self.report.furthest, apart)
            if not apart <= CLOSE:  # NaN as well
                self.find(graph, f"picture {index} is {255 * apart:.2f}/255 from the library's, with {used}")
        if not len(told["plans"]) == len(pictures) == len(found):
            self.find(graph, f"{len(pictures)} pictures, {len(told['plans'])} plans, {len(found)} results")
        if told["errors"]:
            self.find(graph, f"{told['errors']} of {graph.errors} lacks of memory met no pass")
        if told["changed"]:
            self.find(graph, f"the originals were changed: {told['changed'][:9]}")
        return found.numpy()

    def _backbone(self, model: str) -> DiffusersBackbone:
        if model not in self._backbones:
            generator = embedded_generator() if model == "embedded" else self._folder / model
            self._backbones[model] = load_backbone(Recipe(generator=generator, device="cpu", dtype="fp32"))
        return self._backbones[model]

    def post_damaged(self, random: Random) -> None:
        """A prompt with a changed value; it is refused, or runs and ends in whatever way that is told in words."""
        graph = replace(random_graph(random, 0, 16), sizes=(1, 8, 8), errors=0, masked=False)
        name = self.server.upload(Image.fromarray(graph.picture()[0]), "damaged.png")
        prompt = mutated_json(random, prompt_of(graph, [name]))
        try:
            json.dumps(prompt)
        except RecursionError:  # cannot be sent
            return
        said = len(self.server.log())
        try:
            answer = self.server.post("/prompt", {"prompt": prompt})
        except Exception as error:
            if any(name in self.server.log()[said:] for name in ("icmsr_core", "custom_nodes")):
                self._find_prompt(prompt, f"{type(error).__name__}: {error}: {self.server.log()[said:][-2500:]}")
            end = "core itself failed"
        else:
            end = "refused"
            if "prompt_id" in answer:
                end, error_data = self._end_of(answer["prompt_id"])
                ours = str(error_data.get("node_type")).startswith("ICMSR_")
                if end.startswith("nothing") or (ours and not error_data["exception_type"].endswith(IN_WORDS)):
                    self._find_prompt(prompt, f"{end}: {json.dumps(error_data)[:2500]}")
        self.report.counts[f"damaged prompt: {end}"] += 1

    def _find_prompt(self, prompt: Any, text: str) -> None:
        self.report.findings.append({"prompt": repr(prompt)[:2500], "seed": self.seed, "finding": text})

    def find(self, graph: Graph, text: str) -> None:
        """Notes a finding."""
        self.report.findings.append({"graph": graph.number, "seed": self.seed, "kind": graph.kind, "finding": text})

    def resident(self) -> int:
        """Resident bytes of the server."""
        lines = Path(f"/proc/{self.server.pid}/status").read_text("utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))


@contextmanager
def start_comfyui(base: Path) -> Iterator[Server]:
    """A running ComfyUI with the pack, the campaign's nodes and two more generators, in the folder `base`."""
    comfyui = find_comfyui()
    assert comfyui is not None, "no ComfyUI: set COMFYUI_PATH"
    nodes, models = base / "custom_nodes" / "campaign", base / "models" / "icmsr"
    shutil.copytree(Path(__file__).with_name("graph_nodes"), nodes)
    models.mkdir(parents=True)
    for number, name in enumerate(MODELS[1:]):
        write_generator(models / name, embedded_base(), seed=number)
    # By default core keeps the results of every graph until memory is short, which would look like a leak.
    server = Server(prepare_python(comfyui), comfyui, base, options=["--cache-classic"])
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def run_graphs(
    graphs: int, prompts: int, seed: int, minutes: float, side: int, say: Callable[[str], None], distinct: int = 0
) -> Report:
    """The campaign: `graphs` and `prompts` on one server, within `minutes`; `distinct` graphs differ, 0 for all."""
    silence_diffusers()
    with tempfile.TemporaryDirectory(prefix="icmsr-graphs-") as place, start_comfyui(Path(place) / "comfy") as server:
        ends = time.monotonic() + 60 * minutes  # a busy machine needs minutes for the start
        campaign = Campaign(server, server.base / "models" / "icmsr", seed)
        _run_all(campaign, (graphs, distinct or graphs), prompts, side, ends, say)
    return campaign.report


def _run_all(
    campaign: Campaign, numbers: tuple[int, int], prompts: int, side: int, ends: float, say: Callable[[str], None]
) -> None:
    random, report, (graphs, distinct) = Random(campaign.seed), campaign.report, numbers
    planned = [random_graph(random, number, side) for number in range(distinct)]
    first = [replace(graph, kind="plain", errors=0) for graph in planned[:FIRST]]
    results = []
    for graph in first:
        results.append(campaign.run(graph))
        report.first.append(report.memory[-1])
    say(f"{len(first)} graphs, {len(report.findings)} findings, {report.memory[-1] / 1e6:.0f} MB")
    for number in range(FIRST, graphs):
        if time.monotonic() > ends or not campaign.server.alive:
            break
        campaign.run(planned[number % distinct], repeated=number >= distinct)
        if random.random() < prompts / max(1, graphs):
            campaign.post_damaged(random)
        if number % 10 == 0:
            say(f"{number} graphs, {len(report.findings)} findings, {report.memory[-1] / 1e6:.0f} MB")
    half = report.memory[len(report.memory) // 2 :]
    if not campaign.server.alive:
        report.findings.append({"finding": f"the process ended: {campaign.server.log()[-3000:]}"})
        return
    for graph, before in zip(first, results):
        after = campaign.run(graph, repeated=True)
        report.again.append(report.memory[-1])
        if before is not None and after is not None and not np.array_equal(before, after):
            campaign.find(graph, f"another result at the end: {255 * np.abs(before - after).max():.3f}/255 apart")
    growth = float(np.polyfit(np.arange(len(half)), half, 1)[0]) * len(half)
    if growth > GROWTH:
        report.findings.append({"finding": f"memory grows: {growth / 1e6:.0f} MB over the last {len(half)} graphs"})
    if max(report.again) - max(report.first) > GROWTH:
        text = f"the first graphs took {max(report.first) / 1e6:.0f} MB, at the end {max(report.again) / 1e6:.0f} MB"
        report.findings.append({"finding": text})


def main() -> int:
    """The command line; 0 without findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=500)
    parser.add_argument(
        "--distinct", type=int, default=0, help="of the graphs, how many differ: the others repeat them (default: all)"
    )
    parser.add_argument("--prompts", type=int, default=500, help="damaged prompts in between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=110, help="no new graph after this long")
    parser.add_argument(
        "--side", type=int, default=64, help="largest side of a picture; results are up to 4 times that"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}, at most {options.minutes:g} minutes", flush=True)
    started = time.monotonic()

    def say(line: str) -> None:
        print(line, flush=True)

    sizes = (options.graphs, options.prompts, options.seed, options.minutes, options.side)
    report = run_graphs(*sizes, say, options.distinct)
    for finding in report.findings:
        print(json.dumps(finding))
    for kind, count in sorted(report.counts.items()):
        print(f"{kind:<40}{count:>6}")
    print(
        f"{(time.monotonic() - started) / 60:.1f} minutes, {len(report.findings)} findings, {report.compared} pictures "
        f"at most {255 * report.furthest:.3f}/255 from the library's, memory {max(report.first) / 1e6:.0f} MB in the "
        f"first {len(report.first)} graphs, {max(report.again, default=0) / 1e6:.0f} MB in the same at the end"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
