"""What the fuzz reads: for every kind of file a maker of inputs, and the readers that a user reaches with it."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import ModuleType

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from icmsr_core.cli.inspection import file_report
from icmsr_core.cli.main import main
from icmsr_core.errors import IcmsrError
from icmsr_core.exchange.importers import ImportSettings, import_checkpoint
from icmsr_core.foreign.conversion import load_any_generator
from icmsr_core.foreign.kinds import IMPORT_KINDS
from icmsr_core.foreign.lora_files import read_lora
from icmsr_core.foreign.one_step_checkpoints import PICKLED_LAYOUTS
from icmsr_core.foreign.told import Told
from icmsr_core.pictures.files import WRITE_EXTENSIONS, read_picture, stored_size, write_picture
from icmsr_core.runtime.diffusers_backbone import build_networks, load_backbone, silence_diffusers
from icmsr_core.runtime.recipe import Recipe
from icmsr_core.train.networks.adapters import load_adapter, make_adapter, save_adapter
from icmsr_core.train.run.checkpoint import newest_checkpoint
from icmsr_core.train.run.launch import parse_config
from icmsr_core.weights.base import open_base
from icmsr_core.weights.diffusers_folder import WEIGHTS_FILE
from icmsr_core.weights.generator_file import load_generator
from icmsr_core.weights.pickles import read_pickle
from icmsr_core.weights.tensor_files import read_tensors
from icmsr_core.weights.tiny_vae_file import read_tiny_vae
from tests.campaign.mutation import json_text, mutated_bytes, mutated_json, mutated_safetensors
from tests.campaign.picture_files import PNG_START, mutated_png, picture_file
from tests.support.generators import TINY
from tests.support.hostile_pickle import HostileValue
from tests.support.model_files import write_base, write_generator
from tests.support.places import ROOT

MARK = "code-was-run"
"""A file of this name in a case's folder: something ran the code in a pickle."""
EXACT = (".png", ".tif", ".tiff")
"""Formats in which a picture keeps its values."""
SMALL = 64
"""Pixels a side of the pictures that are upscaled."""


class Wrong(Exception):
    """A reader did something that it must not; the text says what."""


@dataclass(frozen=True)
class Case:
    """One input on disk, and what reads it."""

    read: Callable[[], object]
    """Ends with a result, or with an `IcmsrError` whose text holds one of `names`."""
    names: tuple[str, ...]


Maker = Callable[[Random, Path, Path], Case]
"""Makes a case in an empty folder (the second argument) from the stock (the third) that `make_stock` made."""


def make_stock(stock: Path) -> None:
    """Whole small files of every kind of weights, for all cases to start from."""
    silence_diffusers()
    base = write_base(stock / "base", TINY)
    write_generator(stock / "generator.safetensors", base)
    write_generator(stock / "two_sets.safetensors", base, two_sets=True)
    save_adapter(stock / "adapter", make_adapter(4, 2, (32, 32)), {"family": "nano"}, torch.float16)
    modules = [key.removesuffix(".weight") for key in open_base(base).unet_state() if key.endswith("to_q.weight")]
    for name, prefix, (down, up), alpha in (
        ("kohya", "lora_unet_", ("lora_down", "lora_up"), True),
        ("diffusers", "unet.", ("lora_A", "lora_B"), False),
    ):
        tensors = {}
        for module in modules:
            stem = prefix + (module.replace(".", "_") if alpha else module)
            tensors[f"{stem}.{down}.weight"] = torch.randn(2, 32) * 0.1
            tensors[f"{stem}.{up}.weight"] = torch.randn(32, 2) * 0.1
            if alpha:
                tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        save_file(tensors, stock / f"{name}.safetensors")
    kind = PICKLED_LAYOUTS["osediff"]
    pickled: dict = {"rank_unet": 2, "rank_vae": 2, "state_dict_vae": {}, "vae_lora_encoder_modules": []}
    pickled["state_dict_unet"] = {"conv_in.base_layer.weight": torch.zeros(32, 4, 3, 3)}
    for adapter, listed in kind.unet.modules.items():
        pickled[listed] = modules if "encoder" in adapter else []
        for module in pickled[listed]:
            pickled["state_dict_unet"][f"{module}.lora_A.{adapter}.weight"] = torch.randn(2, 32)
            pickled["state_dict_unet"][f"{module}.lora_B.{adapter}.weight"] = torch.randn(32, 2)
    torch.save(pickled, stock / "osediff.pkl")
    tiny = {"encoder.layers.0.weight": torch.zeros(64, 3, 3, 3), "decoder.layers.0.weight": torch.zeros(64, 4, 3, 3)}
    save_file(tiny, stock / "tiny_vae.safetensors")
    state = {"weight/weights/x": torch.zeros(3)}
    save_file(state, stock / "state.safetensors", {"format": "icmsr-training-state", "position": "{}"})


def picture(random: Random, folder: Path, stock: Path) -> Case:
    """A picture that is read; where it can be read, it is also written again in any format, and read once more."""
    ending, data = _mutated_picture(random)
    path, copy = folder / f"in{ending}", folder / f"out{random.choice(WRITE_EXTENSIONS)}"
    path.write_bytes(data)

    def read() -> object:
        found = read_picture(path)
        height, width = found.rgb.shape[:2]
        if stored_size(path) != (width, height):
            raise Wrong(f"the header says {stored_size(path)}, the picture is {width} x {height}")
        for values in (found.rgb, found.alpha):
            if values is not None and not (values.min() >= 0 and values.max() <= 1):  # NaN as well
                raise Wrong(f"values from {values.min()} to {values.max()}")
        if max(height, width) > 4 * SMALL:
            return found
        try:
            write_picture(copy, found)
        except IcmsrError as error:
            raise Wrong(f"was read, cannot be written: {error}") from error
        again = read_picture(copy)
        if again.rgb.shape != found.rgb.shape:
            raise Wrong("another size after writing")
        apart = float(np.abs(again.rgb - found.rgb).max())
        if copy.suffix in EXACT and apart > 0.51 / (2**found.bits - 1):
            raise Wrong(f"{255 * apart:.2f}/255 apart after writing {found.bits} bits as {copy.suffix}")
        return found

    return Case(read, (str(path),))


def upscale(random: Random, folder: Path, stock: Path) -> Case:
    """A picture of at most 64 pixels a side through the whole command with a tiny generator."""
    for _ in range(50):
        ending, data = _mutated_picture(random) if random.random() < 0.7 else picture_file(random)
        path = folder / f"in{ending}"
        path.write_bytes(data)
        size = stored_size(path)
        if size is None or max(size) <= SMALL:
            break
    target = folder / f"out{random.choice(WRITE_EXTENSIONS)}"
    options = ["--base", str(stock / "base"), "--model", str(stock / "generator.safetensors"), "--device", "cpu"]

    def read() -> object:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(["upscale", str(path), str(target), *options])
        lines = [line for line in said.getvalue().splitlines() if line.startswith("icmsr: error:")]
        if "Traceback" in said.getvalue():
            raise Wrong(f"a traceback: {said.getvalue()}")
        if code == 0:
            with Image.open(target) as result:
                result.load()
            if size is None or result.size != (4 * size[0], 4 * size[1]):
                raise Wrong(f"{size} became {result.size}")
            return True
        if code != 1 or len(lines) != 1 or target.exists():
            raise Wrong(f"exit code {code}, result {target.exists()}, said {said.getvalue()!r}")
        raise IcmsrError(lines[0])

    return Case(read, (str(path),))


def safetensors(random: Random, folder: Path, stock: Path) -> Case:
    """A .safetensors of any of our kinds, changed, for the readers of its kind, or for those of another."""
    name = random.choice(("generator", "two_sets", "adapter", "kohya", "diffusers", "tiny_vae", "state"))
    path = folder / f"{name}.safetensors"
    path.write_bytes(mutated_safetensors(random, (stock / f"{name}.safetensors").read_bytes()))
    base = stock / "base"
    recipe = Recipe(base=str(base), generator=path, device="cpu", dtype="fp32")
    own: dict[str, Callable[[], object]] = {
        "generator": lambda: load_backbone(recipe),
        "two_sets": lambda: load_backbone(replace(recipe, fidelity=1.5)),
        "adapter": lambda: load_adapter(path, 2),
        "kohya": lambda: read_lora(path, _modules(base)),
        "diffusers": lambda: read_lora(path, _modules(base)),
        "tiny_vae": lambda: read_tiny_vae(path),
        "state": lambda: read_tensors(path),
    }
    any_kind: tuple[Callable[[], object], ...] = (
        *own.values(),
        lambda: file_report(path),
        lambda: load_generator(path),
        lambda: load_any_generator(path, Told(family="sd21")),
        lambda: open_base(path),
        lambda: import_checkpoint("lora", path, folder / "made.safetensors", ImportSettings(base=base)),
    )
    return Case(own[name] if random.random() < 0.6 else random.choice(any_kind), (str(path), path.name))


def lora(random: Random, folder: Path, stock: Path) -> Case:
    """A LoRA of one of the layouts, changed, imported as a generator; in every third case as PEFT's folder."""
    name = random.choice(("kohya", "diffusers"))
    base = stock / "base"
    if random.random() < 0.35:
        source = folder / "peft"
        source.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "rank_pattern": {}}
        config["alpha_pattern"] = {"to_q": 3}
        tensors = read_tensors(stock / "diffusers.safetensors")[0]
        renamed = {key.replace("unet.", "base_model.model.", 1): value for key, value in tensors.items()}
        save_file(renamed, source / "adapter_model.safetensors")
        (source / "adapter_config.json").write_text(json_text(mutated_json(random, config)), "utf-8", "surrogatepass")
        if random.random() < 0.3:
            data = (source / "adapter_model.safetensors").read_bytes()
            (source / "adapter_model.safetensors").write_bytes(mutated_safetensors(random, data))
    else:
        source = folder / f"{name}.safetensors"
        source.write_bytes(mutated_safetensors(random, (stock / f"{name}.safetensors").read_bytes()))
    made = folder / "made.safetensors"

    def read() -> object:
        try:
            found = import_checkpoint("lora", source, made, ImportSettings(base=base))
        except IcmsrError:
            if made.exists():
                raise Wrong("refused, and yet a file was made") from None
            raise
        load_generator(made)
        return found

    return Case(read, (str(source),))


def pickle(random: Random, folder: Path, stock: Path) -> Case:
    """A pickle: changed bytes of a real one, hostile values in one, or a stream of opcodes."""
    path, mark = folder / "checkpoint.pkl", folder / MARK
    way = random.random()
    if way < 0.4:
        path.write_bytes(mutated_bytes(random, (stock / "osediff.pkl").read_bytes()))
    elif way < 0.7:
        values = dict(read_pickle(stock / "osediff.pkl"))
        for _ in range(random.randint(1, 3)):
            key = random.choice(sorted(values))
            values[key] = random.choice(
                (
                    HostileValue(mark),
                    None,
                    -1,
                    0,
                    2**40,
                    "x",
                    [],
                    {},
                    torch.zeros(2),
                    float("nan"),
                    [HostileValue(mark)],
                )
            )
        torch.save(values, path, _use_new_zipfile_serialization=random.random() < 0.5)
    else:
        path.write_bytes(_opcodes(random, mark))
    made = folder / "made.safetensors"
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_pickle(path),
        lambda: import_checkpoint(random.choice(IMPORT_KINDS[:-1]), path, made),
        lambda: load_any_generator(path, Told()),
        lambda: load_generator(path),
        lambda: open_base(path),
        lambda: file_report(path),
    )
    return Case(random.choice(readers), (str(path),))


def diffusers_folder(random: Random, folder: Path, stock: Path) -> Case:
    """A base folder with one of its files changed or gone, whose networks are built."""
    base = folder / "base"
    shutil.copytree(stock / "base", base)
    files = sorted(path for path in base.rglob("*") if path.is_file())
    path = random.choice([*files, *(file for file in files if file.suffix == ".json")])
    way = random.random()
    if way < 0.1:
        path.unlink()
    elif path.suffix == ".json" and way < 0.85:
        text = json_text(mutated_json(random, json.loads(path.read_text("utf-8"))))
        path.write_text(text, "utf-8", "surrogatepass")
    elif path.name == WEIGHTS_FILE and way < 0.85:
        path.write_bytes(mutated_safetensors(random, path.read_bytes()))
    else:
        path.write_bytes(mutated_bytes(random, path.read_bytes()))

    def read() -> object:
        opened = open_base(base)
        opened.descriptor()
        return build_networks(opened)

    return Case(random.choice((read, read, lambda: file_report(base))), (str(base), "'random'"))


def configuration(random: Random, folder: Path, stock: Path) -> Case:
    """A training configuration with values replaced, or its bytes changed; the training is prepared, not run."""
    name = random.choice(("adapter", "distill", "prior"))
    pattern = {"adapter": "*_adapter.yaml", "distill": "*_distill.yaml", "prior": "nano_*prior.yaml"}[name]
    source = random.choice(sorted((ROOT / "train" / "configs").glob(pattern)))
    text = source.read_text("utf-8")
    if random.random() < 0.7:
        values = mutated_json(random, {**yaml.safe_load(text), "run": str(folder / "run")})
        text = json_text(values)
    else:
        text = mutated_bytes(random, text.encode()).decode("utf-8", "replace")
    path = folder / "config.yaml"
    path.write_text(text, "utf-8", "surrogatepass")
    script = _script(name)
    kinds = {"adapter": "AdapterTraining", "distill": "Distillation", "prior": "PriorTraining"}

    def read() -> object:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                config = parse_config(script.Config, ["--config", str(path), "--run", str(folder / "run")])
        except SystemExit as stop:
            if stop.code == 2 and "error:" in said.getvalue() and "Traceback" not in said.getvalue():
                raise IcmsrError("usage") from None  # jsonargparse's own words, of several lines
            raise Wrong(f"exit code {stop.code}: {said.getvalue()}") from None
        try:
            return getattr(script, kinds[name])(config)
        except OSError as error:  # a path that cannot be; `run_script` says it in one line
            raise IcmsrError(str(error)) from None

    return Case(read, ("",))  # a configuration's error names the setting


def checkpoint(random: Random, folder: Path, stock: Path) -> Case:
    """A run folder whose checkpoints are changed, as a start finds it."""
    for images in (16, 32):
        place = folder / "run" / "checkpoints" / f"{images:09d}"
        place.mkdir(parents=True)
        data = (stock / "state.safetensors").read_bytes()
        (place / "state.safetensors").write_bytes(mutated_safetensors(random, data) if random.random() < 0.8 else data)
        if random.random() < 0.1:
            (place / "state.safetensors").unlink()
    return Case(lambda: newest_checkpoint(folder / "run"), (str(folder / "run"),))


KINDS: dict[str, tuple[Maker, int]] = {
    "picture": (picture, 11_500),
    "upscale": (upscale, 500),
    "safetensors": (safetensors, 3_000),
    "lora": (lora, 1_500),
    "pickle": (pickle, 1_500),
    "diffusers folder": (diffusers_folder, 1_000),
    "checkpoint": (checkpoint, 500),
    "configuration": (configuration, 500),
}
"""The kinds, and how many inputs of each there are among 20,000."""


def _mutated_picture(random: Random) -> tuple[str, bytes]:
    ending, data = picture_file(random)
    if random.random() < 0.05:
        return ending, data
    if random.random() < 0.05:  # the wrong ending
        ending = random.choice(WRITE_EXTENSIONS)
    if data.startswith(PNG_START) and random.random() < 0.6:
        return ending, mutated_png(random, data)
    return ending, mutated_bytes(random, data)


def _modules(base: Path) -> list[str]:
    return [key.removesuffix(".weight") for key in open_base(base).unet_state() if key.endswith(".weight")]


def _opcodes(random: Random, mark: Path) -> bytes:
    """A pickle that calls `touch` on `mark` by one of several ways, with noise before or after it."""
    call = random.choice((b"cposix\nsystem\n", b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n"))
    touch = f"touch {mark}".encode()
    body = call + b"(X" + len(touch).to_bytes(4, "little") + touch + b"tR."
    head = random.choice(
        (b"", b"\x80\x02", b"\x80\x04", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    )
    data = head + body
    return data if random.random() < 0.5 else mutated_bytes(random, data)


_scripts: dict[str, ModuleType] = {}


def _script(name: str) -> ModuleType:
    """The module train/`name`.py."""
    import importlib.util
    import sys

    if name not in _scripts:
        spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "train" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _scripts[name] = module
    return _scripts[name]


def shares(inputs: int) -> Iterator[tuple[str, int]]:
    """How many of `inputs` are of which kind; at least one of each."""
    whole = sum(share for _, share in KINDS.values())
    for name, (_, share) in KINDS.items():
        yield name, max(1, round(inputs * share / whole))
