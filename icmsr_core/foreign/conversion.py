"""Foreign weights as generators, in memory: what `icmsr import` writes, and the doors that take foreign files run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..backbone.noise_schedule import NoiseSchedule
from ..backbone.prediction import check_prediction
from ..errors import IcmsrError
from ..weights.generator_file import (
    GENERATOR_FORMAT,
    PARTS,
    REALISTIC,
    Generator,
    GeneratorInfo,
    LoraPair,
    PartWeights,
    check_coeff_t,
    load_generator,
    parse_info,
)
from ..weights.merging import misfit, not_for_this_base
from ..weights.tensor_files import read_head
from .containers import SAFE, Container, read_container
from .kinds import LORA_KIND
from .layouts import Layout, Shapes, published_layout
from .lora_files import lora_file, lora_of, read_lora, with_alpha
from .one_step_checkpoints import PEFT_ALPHA, PICKLED_LAYOUTS, read_pickled
from .recognition import OMGSR_FOLDERS, omgsr_folder, recognise, refuse_hopeless
from .relatives import RELATIVE, check_complete, module_names
from .told import Told

LORA_NOTES = "A LoRA file says neither its timestep nor what the UNet's output means: both are what the user told."
LORA_TIMESTEP = 999
"""A LoRA's timestep where `icmsr import` is not told one: most one-step models have it."""
VAE_PREFIX = "encoder."
"""OMGSR's names of the VAE's modules lack it."""


def load_any_generator(
    path: Path, told: Told, name: str = "", layouts: Mapping[str, Layout] | None = None
) -> tuple[Generator, str]:
    """The generator at `path`, ours or foreign, and for a foreign one a line that says what was found; else empty.

    `name` is its name in messages; empty: the path. `told` completes a LoRA file and may change any generator's
    `coeff_t`. `layouts` has the layers of the base by its family; of others those count that are published.

    Raises `IcmsrError` as `load_generator` and `read_foreign`, for a LoRA of which family, timestep and prediction are
    not all told, and for an option that contradicts the file.
    """
    if is_generator_file(path):
        generator, found = load_generator(path, name), ""
        generator = replace(generator, info=with_told(generator.info, name or str(path), told))
    else:
        check_head(path)
        folder = omgsr_folder(path)
        file = None if folder is not None else read_container(lora_file(path))
        kind = "omgsr" if file is None else recognise(file)
        if kind == LORA_KIND:
            _check_told(path, told)
        try:
            family = told_info(kind, told).family
        except IcmsrError as error:
            raise IcmsrError(f"{name or path}: {error}") from None
        layout = (layouts or {}).get(family) or published_layout(family)
        generator = read_foreign(kind, folder or path, told, layout, file)
        generator = replace(generator, name=name or str(path))
        found = found_line(kind, generator)
    return generator, found


def is_generator_file(path: Path) -> bool:
    """Whether the file at `path` is one of our own. Raises `IcmsrError` for a damaged .safetensors."""
    return path.is_file() and path.suffix.lower() == SAFE and read_head(path)[1].get("format") == GENERATOR_FORMAT


def check_head(path: Path) -> None:
    """Raises `IcmsrError` for what the head of a .safetensors at `path` shows to be neither a generator nor a LoRA.

    Also for a path that does not exist. Pickles have no head to look at.
    """
    if not path.exists():
        raise IcmsrError(f"{path}: no such file: give a generator file, or foreign weights")
    if path.is_file() and path.suffix.lower() == SAFE:
        keys, metadata = read_head(path)
        if not any("lora" in key for key in keys):
            parse_info(path, metadata, keys)


def stored_dtype(generator: Generator) -> torch.dtype:
    """The precision in which `generator` is stored: that of its tensors if all have one, else float32."""
    held = [weights for part in PARTS for weights in generator.sets(part)]
    pairs = [half.dtype for weights in held for pair in weights.lora.values() for half in pair]
    dtypes = {*pairs, *(tensor.dtype for weights in held for tensor in weights.tensors.values())}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def read_foreign(kind: str, source: Path, told: Told, layout: Layout, file: Container | None = None) -> Generator:
    """The foreign weights at `source`, of a `kind` of `IMPORT_KINDS`, as a generator without a prompt embedding.

    `layout` has the layers of the base, whose shapes the matrices get. `file` is the content of `source` if it was read
    already. Tensors keep the precision of the file. Raises `IcmsrError` as `told_info`, and for a file that cannot be
    read or cannot work, a module that is missing or not known, another rank than the method's, values that are not
    finite, and matrices that do not fit.
    """
    generator = _read(kind, source, told_info(kind, told), layout, file)
    return _fitted(replace(generator, name=f"{source} for {generator.info.family}"), layout)


def _read(kind: str, source: Path, info: GeneratorInfo, layout: Layout, file: Container | None) -> Generator:
    if kind == "omgsr":
        return _omgsr(source, info, layout)
    if kind in PICKLED_LAYOUTS and source.suffix.lower() == SAFE:
        raise IcmsrError(
            f"{source}: is a .safetensors file, but {RELATIVE[kind].title} is published as a pickle: for a LoRA "
            "file use the kind lora"
        )
    file = file or read_container(lora_file(source))
    refuse_hopeless(file)
    if kind in PICKLED_LAYOUTS:
        return _pickled(kind, file, info, layout)
    lora = lora_of(file, module_names("unet", layout))
    if kind == "hypir":  # its file has no alphas, and then those of `lora_of` are the ranks, as HYPIR has it
        check_complete(str(file.path), kind, "unet", lora.pairs, layout)
    return Generator(replace(info, rank=lora.rank, alpha=lora.alpha), PartWeights(lora.pairs), PartWeights())


def told_info(kind: str, told: Told) -> GeneratorInfo:
    """The description of weights of `kind`, without ranks and alphas, completed by what was told.

    A LoRA's timestep and prediction are 999 and eps where they were not. Raises `IcmsrError` for an option that
    contradicts the kind, and for a timestep or prediction that does not exist.
    """
    if kind in RELATIVE:
        return with_told(RELATIVE[kind].info, kind, told)
    timestep = LORA_TIMESTEP if told.timestep is None else told.timestep
    NoiseSchedule().check_timestep(timestep)
    info = GeneratorInfo(told.family, timestep, check_prediction(told.prediction or "eps"), notes=LORA_NOTES)
    return with_told(info, "this LoRA", Told(coeff_t=told.coeff_t))


def with_told(info: GeneratorInfo, title: str, told: Told) -> GeneratorInfo:
    """`info` with the `coeff_t` that was told. Raises `IcmsrError` for other values than the generator's own."""
    for option in ("family", "timestep", "prediction"):
        value, own = getattr(told, option), getattr(info, option)
        if value not in (None, "", own):
            raise IcmsrError(f"the {option} of {title} is always {own}, got {value}: leave out the {option}")
    if told.coeff_t is None:
        return info
    check_coeff_t(told.coeff_t, info.prediction)
    return replace(info, coeff_t=NoiseSchedule().check_timestep(told.coeff_t))


def found_line(kind: str, generator: Generator) -> str:
    """What a foreign file was found to be, in one line: kind, modules and ranks, licence, step."""
    info = generator.info
    title = RELATIVE[kind].title if kind in RELATIVE else "a LoRA of a UNet"
    sets = [("UNet", generator.unet.lora), ("VAE", generator.vae.lora)]
    second = generator.realistic.get("unet")
    sets += [("UNet, second set", second.lora)] if second else []
    held = [f"rank {_rank_words(lora)} on {len(lora)} modules of the {part}" for part, lora in sets if lora]
    step = f"{info.family}, {info.prediction} at timestep {info.timestep}"
    step += f" with coeff_t {info.coeff_t}" if info.coeff_t is not None else ""
    return f"found {title}: {', '.join(held)}; {step}; licence: {info.licence or 'not stated'}"


def _rank_words(lora: Mapping[str, LoraPair]) -> str:
    ranks = sorted({pair.down.shape[0] for pair in lora.values()})
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _check_told(path: Path, told: Told) -> None:
    missing = [name for name in ("family", "timestep", "prediction") if getattr(told, name) in (None, "")]
    if missing:
        raise IcmsrError(
            f"{path}: a LoRA of which nothing else is known. If it is that of a one-step upscaling model, say what its "
            f"authors trained: {', '.join(missing)} (a style LoRA does not upscale: it goes into Load LoRA)"
        )


def _pickled(kind: str, file: Container, info: GeneratorInfo, layout: Layout) -> Generator:
    weights = read_pickled(kind, file)
    for part, held in (("unet", weights.unet), ("vae", weights.vae), ("unet", weights.realistic)):
        if held or part == "vae":
            check_complete(str(file.path), kind, part, held.lora, layout)
    info = replace(info, rank=weights.rank, alpha=PEFT_ALPHA)
    if not weights.realistic:
        return Generator(info, weights.unet, weights.vae)
    info = replace(info, realistic_rank=weights.realistic_rank, realistic_alpha=PEFT_ALPHA)
    return Generator(info, weights.unet, weights.vae, realistic={"unet": weights.realistic})


def _omgsr(source: Path, info: GeneratorInfo, layout: Layout) -> Generator:
    folder = omgsr_folder(source)
    if folder is None:
        raise IcmsrError(
            f"{source}: OMGSR's weights are a folder with {' and '.join(OMGSR_FOLDERS.values())}: give that folder"
        )
    unet = read_lora(folder / OMGSR_FOLDERS["unet"], module_names("unet", layout))
    names = {name.removeprefix(VAE_PREFIX): name for name in module_names("vae", layout)}
    vae = read_lora(folder / OMGSR_FOLDERS["vae"], names)
    # A generator file has one alpha for both networks.
    encoder = {names[name]: with_alpha(pair, vae.alpha, unet.alpha) for name, pair in vae.pairs.items()}
    for part, lora in (("unet", unet.pairs), ("vae", encoder)):
        check_complete(str(folder), "omgsr", part, lora, layout)
    return Generator(replace(info, rank=unet.rank, alpha=unet.alpha), PartWeights(unet.pairs), PartWeights(encoder))


def _fitted(generator: Generator, layout: Layout) -> Generator:
    """`generator` with its LoRA matrices in the shapes of their layers; raises `IcmsrError` for what does not fit."""
    wrong: list[str] = []
    sets = {part: generator.sets(part) for part in PARTS}
    faithful = {part: _fit(f"{part}.", first, layout[part], wrong) for part, (first, _) in sets.items()}
    realistic = {
        part: _fit(f"{REALISTIC}{part}.", second, layout[part], wrong) for part, (_, second) in sets.items() if second
    }
    if wrong:
        raise not_for_this_base(generator.name, wrong)
    return replace(generator, unet=faithful["unet"], vae=faithful["vae"], realistic=realistic)


def _fit(prefix: str, weights: PartWeights, shapes: Shapes, wrong: list[str]) -> PartWeights:
    for parameter, tensor in weights.tensors.items():
        if shapes.get(parameter) != tuple(tensor.shape):
            wrong.append(misfit(prefix + parameter, tensor.shape, shapes.get(parameter)))
    lora: dict[str, LoraPair] = {}
    for module, (down, up) in weights.lora.items():
        shape = shapes.get(f"{module}.weight", ())
        # A convolution of one pixel is a linear layer; files have it in either form.
        if len(shape) != down.ndim and all(side == 1 for side in (*shape[2:], *down.shape[2:])):
            down = down.reshape(*down.shape[:2], *shape[2:])
        up = up.reshape(*up.shape[:2], *[1] * (down.ndim - 2)) if all(side == 1 for side in up.shape[2:]) else up
        got = (up.shape[0], *down.shape[1:])
        if got != shape or any(side != 1 for side in up.shape[2:]):
            wrong.append(misfit(f"{prefix}{module}.weight", got, shape or None))
        lora[module] = LoraPair(down, up)
    return PartWeights(lora, weights.tensors)
