"""What teacher and auxiliary are conditioned on: every kind, its settings, and how features come of it."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import MultiAdapter, T2IAdapter
from safetensors.torch import save_file
from torch import Tensor

from icmsr_core import conditions
from icmsr_core.conditions import canny_edges, colormap, register_structure, sketch, structure_names
from icmsr_core.errors import IcmsrError
from icmsr_core.train.data.data_config import DataConfig
from icmsr_core.train.data.pairs import TrainingPairs
from icmsr_core.train.networks.adapters import make_adapter, save_adapter
from icmsr_core.train.networks.conditioning import ConditionConfig, StructureConfig, StructureFeatures, picture_of
from icmsr_core.train.run.loop import train
from icmsr_core.train.run.loop_config import LoopConfig
from icmsr_core.train.run.processes import Processes
from icmsr_core.train.tasks.building import Loading, build_generator_task
from icmsr_core.train.tasks.generator_config import GeneratorConfig, LossWeights
from icmsr_core.upscale.sizes import resize
from icmsr_core.weights.base import open_base

WIDTHS = [32, 64]


def pictures(count: int = 2, side: int = 64) -> Tensor:
    """Smooth colours with a few hard borders, so that every structure finds something."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    smooth[:, :, side // 4 : side // 2, side // 3 : side // 2] = 0.95
    return smooth


def saved_adapter(folder: Path, name: str, channels: int, structure: object = None, factor: int = 8) -> str:
    torch.manual_seed(sum(map(ord, name)))
    description = {} if structure is None else {"structure": structure}
    return str(save_adapter(folder / name, make_adapter(channels, factor, WIDTHS), description, torch.float32)[0])


# Kinds and maps.


@pytest.mark.parametrize(
    ("kind", "names", "widths"),
    [
        ("icm", ("colormap", "edges"), [3, 1]),
        ("colormap", ("colormap",), [3]),
        ("edges", ("edges",), [1]),
        ("image", ("image",), [3]),
        ("none", (), []),
        ("text", (), []),
        ("sketch", ("sketch",), [1]),
        ("segmentation", ("segmentation",), [3]),
        ("colormap+sketch", ("colormap", "sketch"), [3, 1]),
        ("edges+colormap+segmentation", ("edges", "colormap", "segmentation"), [1, 3, 3]),
    ],
)
def test_each_kind_names_its_structures_and_channels(kind, names, widths):
    config = ConditionConfig(kind=kind)
    assert config.names == names
    assert config.widths == widths
    assert config.channels == sum(widths)
    assert config.describe()["names"] == list(names)
    assert json.loads(json.dumps(config.describe())) == config.describe(), "an adapter's file keeps it as JSON"
    if names:
        maps = config.maps(pictures())
        assert maps.shape == (2, sum(widths), 64, 64)
        assert maps.dtype == torch.float32
        assert 0 <= float(maps.min()) < float(maps.max()) <= 1


def test_every_registered_structure_is_a_kind():
    for name in structure_names():
        assert ConditionConfig(kind=name).maps(pictures()).shape[1] == ConditionConfig(kind=name).channels


def test_maps_are_those_of_the_structures():
    image = pictures()
    assert torch.equal(ConditionConfig().maps(image), torch.cat([colormap(image, (8, 8)), canny_edges(image)], 1))
    assert torch.equal(
        ConditionConfig(kind="colormap+sketch").maps(image), torch.cat([colormap(image, (8, 8)), sketch(image)], 1)
    )
    assert torch.equal(ConditionConfig(kind="image").maps(image), image)
    soft = ConditionConfig(kind="edges", canny_low=20, canny_high=60).maps(image)
    assert torch.equal(soft, canny_edges(image, 20, 60))
    assert not torch.equal(soft, ConditionConfig(kind="edges").maps(image))


@pytest.mark.parametrize("cells", [1, 2, 8, 32, 64])
def test_cells_go_from_sparse_to_dense(cells):
    image = pictures(1)
    maps = ConditionConfig(kind="colormap", cells=cells).maps(image)
    assert torch.equal(maps, colormap(image, (cells, cells)))
    side = 64 // cells
    blocks = maps.reshape(1, 3, cells, side, cells, side)
    assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks)), "one colour to a cell"
    if cells == 64:
        assert float((maps - image).abs().max()) <= 0.5 / 255 + 1e-6, "as many cells as pixels: the picture in 8 bits"


def test_what_an_adapter_is_trained_for_tells_conditions_apart():
    described = [
        StructureConfig(**values).describe()
        for values in (
            {},
            {"cells": 16},
            {"canny_low": 50.0},
            {"canny_high": 300.0},
            {"kind": "colormap"},
            {"kind": "colormap+sketch"},
        )
    ]
    assert all(described.count(entry) == 1 for entry in described)
    edges = [StructureConfig(kind="edges", cells=cells).describe() for cells in (8, 16)]
    assert edges[0] == edges[1], "cells mean nothing without a colormap"


# Whose structure.


def test_the_structure_of_the_truth_or_of_the_input():
    random = torch.Generator().manual_seed(1)
    batch = {
        "sharp": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=random),
        "low": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=random),
    }
    truth, given = picture_of(batch, "truth"), picture_of(batch, "input")
    assert torch.equal(truth, batch["sharp"].float() / 255)
    assert torch.equal(given, resize(batch["low"].float() / 255, 64, 64))
    assert truth.shape == given.shape
    maps = [ConditionConfig(source=source).maps(picture_of(batch, source)) for source in ("truth", "input")]
    assert float((maps[0] - maps[1]).abs().mean()) > 0.01


# Features.


def test_one_adapter_s_features_are_its_own_times_its_weight(tmp_path):
    config = ConditionConfig(adapters=(saved_adapter(tmp_path, "both", 4, ConditionConfig().describe()),))
    features = StructureFeatures.load(config, 8, WIDTHS)
    maps = config.maps(pictures())
    found = features(maps)
    expected = T2IAdapter.from_pretrained(tmp_path / "both", low_cpu_mem_usage=False)(maps)
    assert [tuple(level.shape) for level in found] == [(2, 32, 8, 8), (2, 64, 4, 4)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not any(level.requires_grad for level in features(maps.requires_grad_()))
    doubled = StructureFeatures.load(ConditionConfig(adapters=config.adapters, adapter_weights=(2.0,)), 8, WIDTHS)
    assert all(torch.allclose(one, 2 * other) for one, other in zip(doubled(maps), found))


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (0.7, 1.3), (0.0, 1.0)])
def test_features_of_several_adapters_are_the_weighted_sum(tmp_path, weights):
    paths = (saved_adapter(tmp_path, "colour", 3), saved_adapter(tmp_path, "canny", 1))
    config = ConditionConfig(adapters=paths, adapter_weights=weights)
    found = StructureFeatures.load(config, 8, WIDTHS)(config.maps(pictures()))
    several = MultiAdapter(
        [T2IAdapter.from_pretrained(tmp_path / name, low_cpu_mem_usage=False) for name in ("colour", "canny")]
    )
    parts = [colormap(pictures(), (8, 8)), canny_edges(pictures())]
    # Explicit weights: without any, diffusers takes 1/2 each where the published pair is summed.
    expected = several(parts, list(weights) or [1.0, 1.0])
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


def test_an_adapter_of_another_factor_needs_no_description(tmp_path):
    torch.manual_seed(0)
    adapter, path = make_adapter(3, 4, WIDTHS), tmp_path / "foreign.safetensors"
    save_file(adapter.state_dict(), path)
    config = ConditionConfig(kind="colormap", adapters=(str(path),))
    features, maps = StructureFeatures.load(config, 4, WIDTHS), config.maps(pictures())
    assert all(torch.equal(one, other) for one, other in zip(features(maps), adapter(maps)))


def test_features_follow_the_precision_of_the_base(tmp_path):
    config = ConditionConfig(kind="edges", adapters=(saved_adapter(tmp_path, "edges", 1),))
    features = StructureFeatures.load(config, 8, WIDTHS)
    maps = config.maps(pictures())
    wide = features(maps)
    narrow = torch.nn.Module.to(features, torch.bfloat16)(maps)
    for one, other in zip(wide, narrow):
        assert other.dtype == torch.bfloat16
        assert torch.allclose(one, other.float(), rtol=0.1, atol=0.05 * float(one.abs().max()))


# What is refused.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "depth"}, "unknown structure 'depth': choose from .*colormap"),
        ({"kind": "colormap+"}, "unknown structure ''"),
        ({"kind": ""}, "unknown structure ''"),
        ({"cells": 0}, "between 1 and 64, got 0"),
        ({"cells": 65}, "between 1 and 64, got 65"),
        ({"source": "guess"}, "truth, input, got 'guess'"),
        ({"adapters": ("a",), "adapter_weights": (1.0, 1.0)}, r"one weight per adapter \(1\), got 2"),
        ({"kind": "none", "guidance": 2.0}, "guidance must be 1 with the condition none, got 2.0"),
        ({"kind": "none", "adapters": ("a",)}, r"none takes no adapters, got \['a'\]"),
        ({"kind": "text", "adapters": ("a",)}, r"text takes no adapters, got \['a'\]"),
    ],
)
def test_wrong_conditions_name_the_value(values, words):
    with pytest.raises(IcmsrError, match=words):
        ConditionConfig(**values)


def test_adapters_that_do_not_fit_the_condition_are_refused(tmp_path):
    trained_for = ConditionConfig().describe()
    both, colour = saved_adapter(tmp_path, "both", 4, trained_for), saved_adapter(tmp_path, "colour", 3)
    cases = [
        (ConditionConfig(), "needs 1 adapter for its 4 channels, or 2: one each for colormap, edges; got 0: train one"),
        (ConditionConfig(adapters=(colour,) * 3), "got 3"),
        (ConditionConfig(kind="edges"), "needs 1 adapter for its 1 channels; got 0"),
        (ConditionConfig(adapters=(colour,)), "takes 3 channels, the condition has 4"),
        (ConditionConfig(adapters=(colour, both)), "takes 4 channels, the condition has 1"),
        (ConditionConfig(adapters=("/none",)), "no such adapter"),
        (ConditionConfig(cells=16, adapters=(both,)), "trained for"),
        (ConditionConfig(kind="colormap+sketch", adapters=(both,)), "trained for"),
    ]
    for config, words in cases:
        with pytest.raises(IcmsrError, match=words):
            config.check_files(8, WIDTHS)
        with pytest.raises(IcmsrError, match=words):
            StructureFeatures.load(config, 8, WIDTHS)
    ConditionConfig(adapters=(both,)).check_files(8, WIDTHS)
    ConditionConfig(kind="text").check_files(8, WIDTHS)


# A structure that nobody has thought of yet.


def test_a_new_structure_trains_without_a_change_to_the_loop(base, tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "_STRUCTURES", dict(conditions._STRUCTURES))
    calls = []

    @register_structure("brightness", 2, "mean brightness of halves, for this test")
    def brightness(image: Tensor) -> Tensor:
        calls.append(image)
        halves = [half.mean(dim=(1, 2, 3)) for half in image.chunk(2, dim=-1)]
        return torch.stack(halves, 1)[..., None, None].expand(-1, -1, *image.shape[-2:]).clone()

    condition = ConditionConfig(kind="edges+brightness")
    assert condition.widths == [1, 2]
    condition = ConditionConfig(
        kind="edges+brightness", adapters=(saved_adapter(tmp_path, "new", 3, condition.describe()),)
    )
    pairs = TrainingPairs(DataConfig(synthetic=1, crop=32), 0)
    generator = GeneratorConfig(losses=LossWeights(l2=1, perceptual=0, icm=1))
    task = build_generator_task(open_base(base), generator, condition, pairs.captions, 0, Loading())
    seen = []
    inner = task.features.forward
    monkeypatch.setattr(task.features, "forward", lambda maps: seen.append(maps) or inner(maps))
    loop = LoopConfig(images=4, batch=2, precision="fp32", workers=0, log_every=2, save_every=4, tensorboard=False)
    written = train(task, pairs, loop, tmp_path / "run", {}, Processes(Accelerator(cpu=True), torch.device("cpu")))
    assert all(path.is_file() for path in written)
    assert len(seen) == 4, "two players, two steps"
    truth = torch.stack([pairs[number]["sharp"] for number in (0, 1)]).float() / 255
    assert torch.equal(seen[0], torch.cat([canny_edges(truth), brightness(truth)], 1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(key.startswith("icm/rho") for line in lines for key in line)
    assert calls
