"""Batches through ICMSR_Upscale with the embedded model: report.json, judged by test_comfy_memory.py."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import comfy_process

options = comfy_process.arguments()
core, pack = comfy_process.start(options)

import folder_paths  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

job: Path = options.job
report: dict = {}
part = comfy_process.parts_of(pack)
upscale_module = part("nodes.upscale")
model_folders = part("nodes.native.folders")
upscale_node = core.NODE_CLASS_MAPPINGS["ICMSR_Upscale"]
model, vae = core.NODE_CLASS_MAPPINGS["ICMSR_LoadEmbedded"].execute().result


class BatchTensors(TorchDispatchMode):
    """The functions of torch that take memory for all pictures of a result at once, however they lie in it."""

    def __init__(self, count: int, height: int, width: int) -> None:
        super().__init__()
        self.count, self.sides, self.found = count, {height, width}, {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in tree_leaves(output):
            is_batch = isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.shape[0] == self.count
            if is_batch and self.sides <= set(tensor.shape):
                self.found.setdefault(tensor.untyped_storage().data_ptr(), str(function))
        return output


def upscaled(pictures: torch.Tensor, **settings) -> torch.Tensor:
    return upscale_node.execute(model, vae, pictures, **{"scale": 2.0, "tile": 64, "overlap": 32, **settings}).result[0]


def batch_and_one_by_one() -> None:
    """16 frames at once and alone; how often memory for the whole batch is taken."""
    frames = torch.rand(16, 20, 36, 4, generator=torch.Generator().manual_seed(1))  # with alpha
    with BatchTensors(16, 40, 72) as whole:
        together = upscaled(frames)
    report["memory for the batch"] = list(whole.found.values())
    alone = torch.cat([upscaled(frames[index : index + 1]) for index in range(16)])
    report["frames"] = {
        "shape": list(together.shape),
        "contiguous": together.is_contiguous(),
        "equal": bool(torch.equal(together, alone)),
        "different pictures": len({float(frame.sum()) for frame in together}),
    }


def out_of_memory() -> None:
    """The second of three pictures does not fit: what is computed, and what comes of it."""
    pictures = torch.rand(3, 64, 96, 3, generator=torch.Generator().manual_seed(2))
    settings = {"tile": 256, "overlap": 64}
    alone = {tile: [upscaled(p[None], tile=tile, overlap=tile // 4) for p in pictures] for tile in (256, 128)}
    network, calls = model.model.diffusion_model, []
    run, forward = upscale_module.run_plan, network.forward
    sums = [float(picture.sum()) for picture in pictures.movedim(-1, 1)]

    def noted(backbone, picture, plan, **others):
        number = min(range(3), key=lambda index: abs(sums[index] - float(picture.sum())))
        calls.append([number, plan.settings.tile])
        return run(backbone, picture, plan, **others)

    def too_small(x, *others, **named):
        if calls[-1] == [1, 256]:
            raise torch.OutOfMemoryError("too large for this test")
        return forward(x, *others, **named)

    bars = []

    class Bar(upscale_module.comfy.utils.ProgressBar):
        def update_absolute(self, value, total=None, preview=None):
            bars.append([value, total])
            super().update_absolute(value, total, preview)

    original_bar = upscale_module.comfy.utils.ProgressBar
    upscale_module.comfy.utils.ProgressBar = Bar
    upscale_module.run_plan, network.forward = noted, too_small
    try:
        result = upscaled(pictures, **settings)
    finally:
        upscale_module.run_plan, network.forward = run, forward
        upscale_module.comfy.utils.ProgressBar = original_bar
    report["out of memory"] = {
        "calls": calls,
        "equal": [
            bool(torch.equal(result[index : index + 1], alone[tile][index]))
            for index, tile in enumerate((256, 128, 128))
        ],
        "last progress": bars[-1],
        "within": all(0 <= value <= total for value, total in bars),
    }


def automatic_tile_batch() -> None:
    """Twelve tiles with tile_batch 0: what is chosen on a CPU, and on a card with this much room."""
    backbone_module, chosen = part("nodes.native.backbone"), []
    run = upscale_module.run_plan

    def noted(backbone, picture, plan, **others):
        chosen.append(plan.settings.batch)
        return run(backbone, picture, plan.with_batch(1), **others)

    picture = torch.rand(1, 64, 80, 3, generator=torch.Generator().manual_seed(3))
    device, room = model.load_device, backbone_module._room
    weights = max(0, model.model_size() - model.loaded_size())
    upscale_module.run_plan = noted
    try:
        expected = upscaled(picture)
        on_cpu = upscaled(picture, tile_batch=0)
        report["tile batch, cpu"] = [*chosen, bool(torch.equal(on_cpu, expected))]
        chosen.clear()
        one = model.memory_required([1, model.model.latent_format.latent_channels, 16, 16])
        backbone = backbone_module.ComfyBackbone(model, vae)
        settings = upscale_module.UpscaleSettings(scale=2.0, tile=64, overlap=32)
        plan = part("icmsr_core.upscale.plan").plan_upscale(backbone.descriptor, 64, 80, settings).tiles
        model.load_device = torch.device("cuda")
        for tiles in (0.5, 3.5, 6.5, 100):
            backbone_module._room = lambda *_, tiles=tiles: weights + tiles * one
            chosen.append(backbone.tiles_together(plan))
    finally:
        model.load_device, backbone_module._room = device, room
        upscale_module.run_plan = run
    report["tile batch, card"] = {"tiles": len(plan), "chosen": chosen}


TEXTS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 5 GiB). Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 17179869184 bytes."),
    "numpy": MemoryError("Unable to allocate 2.00 GiB for an array"),
    "other": RuntimeError("CUDA error: an illegal memory access was encountered"),
}


def lacks_of_each_kind() -> None:
    """Errors of each platform with all plans but one: what is tried, and what comes of it."""
    picture, run = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(4)), upscale_module.run_plan
    found = report["lacks"] = {}
    for name, error in TEXTS.items():
        for vae, fits in (("auto", "bounded"), ("auto", "never"), ("exact", "never")):
            tried = []

            def planted(backbone, picture, plan, *, tried=tried, fits=fits, error=error, **others):
                tried.append([plan.settings.tile, plan.settings.vae])
                if plan.settings.vae != fits:
                    raise error
                return run(backbone, picture, plan, **others)

            upscale_module.run_plan = planted
            try:
                said = refused(picture, tile=256, overlap=32, vae_mode=vae)
            finally:
                upscale_module.run_plan = run
            found[f"{name}, {vae}, {fits}"] = {"tried": tried, "said": said}


class Lines(logging.Handler):
    """The texts that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def planted_budgets() -> None:
    """1024 x 1024 pixels with so much memory free: the VAE mode, and what is said of it."""
    backbone_module, run = part("nodes.native.backbone"), upscale_module.run_plan
    room, picture, found = backbone_module._room, torch.zeros(1, 256, 256, 3), []
    lines = Lines()
    upscale_module.log.addHandler(lines)

    def noted(backbone, picture, plan, **others):
        found.append([plan.settings.vae, plan.exact, *lines.texts])
        return torch.zeros(1, 3, *plan.target)

    upscale_module.run_plan = noted
    try:
        for free, mode in ((1e12, "auto"), (450e6, "auto"), (450e6, "exact"), (450e6, "bounded")):
            backbone_module._room = lambda *_, free=free: free
            lines.texts.clear()
            upscaled(picture, scale=4.0, tile=512, vae_mode=mode)
    finally:
        upscale_module.run_plan, backbone_module._room = run, room
        upscale_module.log.removeHandler(lines)
    report["budgets"] = found


def what_core_gives_back() -> None:
    """Free memory on a card: what core unloads and what its dynamic loading returns count; maps are asked for."""
    backbone_module, management = part("nodes.native.backbone"), upscale_module.comfy.model_management
    card, found = torch.device("cuda"), {}
    reserve = management.extra_reserved_memory()
    dynamic = SimpleNamespace(get_free_memory=lambda _device: 5e9 + reserve)
    kept = {name: getattr(management, name) for name in ("get_free_memory", "loaded_models", "load_models_gpu")}
    own, device, room = backbone_module.free_memory, vae.device, backbone_module._room
    calls = []

    def loaded(size, device=card, dynamic=False, clone=False):
        return SimpleNamespace(
            load_device=device,
            is_dynamic=lambda: dynamic,
            is_clone=lambda _other: clone,
            loaded_size=lambda: size,
        )

    try:
        found["dynamic"] = backbone_module._room(dynamic, card)
        management.get_free_memory = lambda _device: 4e9 + reserve
        found["older core"] = backbone_module._room(SimpleNamespace(), card)
        backbone_module.free_memory = lambda _device: 3e9
        found["cpu"] = backbone_module._room(SimpleNamespace(), torch.device("cpu"))
        found["mps"] = backbone_module._room(SimpleNamespace(), torch.device("mps")) + reserve
        others = [loaded(1000), loaded(1, clone=True), loaded(10, dynamic=True), loaded(100, torch.device("cpu")), None]
        management.loaded_models = lambda: others
        vae.device, backbone_module._room = card, lambda *_: 2e9
        backbone, missing = (
            backbone_module.ComfyBackbone(model, vae),
            vae.patcher.model_size() - vae.patcher.loaded_size(),
        )
        memory = backbone.memory()
        found["unloaded"] = memory.free - 2e9 + missing
        found["kind"] = [memory.kind, memory.itemsize, memory.main is not None]
        management.load_models_gpu = lambda models, **named: calls.append(named)
        for maps in (1e9, 9e9):
            backbone.make_room_for(backbone_module.Need(1e8, maps, 0))
            backbone._active = None
            backbone._load(vae.patcher, 10.0)
        found["asked"] = calls
    finally:
        for name, function in kept.items():
            setattr(management, name, function)
        backbone_module.free_memory, vae.device, backbone_module._room = own, device, room
    report["given back"] = found


def refused(pictures: torch.Tensor, **settings) -> str:
    try:
        upscaled(pictures, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def extra_model_paths() -> None:
    """A user's file with a default folder of its own, read before the pack registers its folder."""
    own = job / "models" / "icmsr"
    file = job / "extra.yaml"
    file.write_text(f"mine:\n    base_path: {job}\n    is_default: true\n    icmsr: mine\n")
    folder_paths.folder_names_and_paths.pop("icmsr")
    utils.extra_config.load_extra_path_config(str(file))
    model_folders.register_folder()
    for folder, names in (("mine", ("both", "theirs")), (own, ("both", "ours"))):
        (job / folder / "deeper").mkdir(parents=True, exist_ok=True)
        for name in names:
            (job / folder / "deeper" / f"{name}.safetensors").write_text(str(folder))
        (job / folder / "notes.txt").touch()
    (own / "LOUD.SAFETENSORS").touch()
    folder_paths.filename_list_cache.clear()
    found = {name: model_folders.find_file(name, "icmsr") for name in model_folders.list_generators()}
    report["extra paths"] = {name: str(path.relative_to(job)) for name, path in found.items()}


with torch.inference_mode():
    batch_and_one_by_one()
    out_of_memory()
    automatic_tile_batch()
    lacks_of_each_kind()
    planted_budgets()
    what_core_gives_back()
    broken = torch.rand(1, 16, 16, 3).repeat(4, 1, 1, 1)
    broken[2, 5, 5, 1] = float("nan")
    report["nan"] = refused(broken)
    report["too many"] = refused(torch.rand(1, 512, 512, 3).expand(10**8, -1, -1, -1), scale=8.0)
extra_model_paths()
(job / "report.json").write_text(json.dumps(report, indent=1))
