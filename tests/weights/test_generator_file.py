"""Generator files: round trips, what they say of themselves, atomic writing."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmsr_core.cli.inspection import file_report
from icmsr_core.errors import IcmsrError
from icmsr_core.weights.embedded import embedded_generator
from icmsr_core.weights.generator_file import (
    Generator,
    GeneratorInfo,
    PartWeights,
    holds_two_sets,
    load_generator,
    save_generator,
)
from icmsr_core.weights.tensor_files import write_tensors
from tests.support.generators import rewrite


def flat(generator: Generator) -> dict[str, torch.Tensor]:
    tensors = {"prompt_embedding": generator.prompt_embedding}
    realistic = [(f"realistic.{part}", weights) for part, weights in generator.realistic.items()]
    for part, weights in (("unet", generator.unet), ("vae", generator.vae), *realistic):
        for module, pair in weights.lora.items():
            tensors[f"{part}.{module}.A"], tensors[f"{part}.{module}.B"] = pair
        tensors |= {f"{part}.{name}": tensor for name, tensor in weights.tensors.items()}
    return tensors


def test_float32_round_trip_is_bitwise(tmp_path, generator: Generator) -> None:
    path = tmp_path / "deep" / "folder" / "generator.safetensors"
    info = replace(generator.info, training={"lr": 0.1, "steps": 3, "data": {"folders": ["a"]}}, base_hash="ab")
    generator = replace(generator, info=info)
    save_generator(path, generator, torch.float32)
    loaded = load_generator(path)
    assert loaded.info == info
    old, new = flat(generator), flat(loaded)
    assert old.keys() == new.keys()
    assert len(loaded.unet.lora) > 10
    assert len(loaded.unet.tensors) == 2
    assert len(loaded.vae.lora) > 5
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_files_are_written_in_float16_unless_told_otherwise(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    old, new = flat(generator), flat(load_generator(path))
    assert old.keys() == new.keys()
    for key in old:
        assert new[key].dtype == torch.float16
        torch.testing.assert_close(new[key].float(), old[key], rtol=6e-4, atol=1e-7)
    save_generator(tmp_path / "full.safetensors", generator, torch.float32)
    assert path.stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size


def test_the_file_keeps_its_tensor_names_and_its_description(tmp_path, generator: Generator) -> None:
    """The contract with other readers: names of tensors and the description in the metadata."""
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    with safe_open(str(path), framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for key in (f"{attention}.lora_A.weight", f"{attention}.lora_B.weight", "unet.conv_in.weight", "prompt_embedding"):
        assert key in keys
    assert metadata["format"] == "icmsr-generator"
    description = json.loads(metadata["icmsr"])
    assert description["family"] == "nano"
    assert description["timestep"] == 200
    assert description["prediction"] == "residual"
    assert description["format_version"] == 1
    assert len(description["base_hash"]) == 64
    assert description.keys() == {
        "family",
        "timestep",
        "prediction",
        "base",
        "base_hash",
        "rank",
        "alpha",
        "licence",
        "training",
        "format_version",
    }  # as the first release wrote it: no word of a second set
    assert not holds_two_sets(path)


def test_the_embedded_file_is_written_again_as_it_is(tmp_path) -> None:
    """Files that are out keep their bytes, whatever this version can do beyond them."""
    save_generator(tmp_path / "again.safetensors", load_generator(embedded_generator()))
    old, new = embedded_generator().read_bytes(), (tmp_path / "again.safetensors").read_bytes()
    data = 8 + int.from_bytes(old[:8], "little")
    assert json.loads(new[8:data]) == json.loads(old[8:data])  # the order within the metadata is safetensors' own
    assert new[:8] == old[:8]
    assert new[data:] == old[data:]


def test_two_sets_round_trip(tmp_path, two_sets: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    # What made it does not know the version of the layout: the weights decide it.
    save_generator(path, replace(two_sets, info=replace(two_sets.info, format_version=1)), torch.float32)
    assert holds_two_sets(path)
    loaded = load_generator(path)
    assert loaded.info == two_sets.info
    assert (loaded.info.realistic_rank, loaded.info.realistic_alpha) == (2, 3.0)
    assert loaded.info.realistic_training == {"loss": "icm"}
    assert loaded.has_two_sets
    old, new = flat(two_sets), flat(loaded)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
    with safe_open(str(path), framework="pt") as file:
        keys, description = set(file.keys()), json.loads(file.metadata()["icmsr"])
    assert {
        "unet.conv_in.weight",
        "realistic.unet.conv_in.weight",
        "realistic.unet.conv_in.lora_A.weight",
        "realistic.vae.quant_conv.lora_B.weight",
        "vae.quant_conv.lora_B.weight",
    } <= keys
    assert description["format_version"] == 2
    assert description["realistic_alpha"] == 3.0
    assert "realistic_default" not in description  # files of before it was there are read the same


def test_a_file_says_its_own_fidelity(tmp_path, two_sets: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    for value in (0.0, 0.25, 2.0):
        save_generator(path, replace(two_sets, info=replace(two_sets.info, realistic_default=value)))
        info = load_generator(path).info
        assert info.realistic_default == value
        assert f"; default {value:g}" in file_report(path)
    for value in (-0.1, 2.5):
        save_generator(path, replace(two_sets, info=replace(two_sets.info, realistic_default=value)))
        with pytest.raises(IcmsrError, match=f"realistic_default in its description must be from 0 to 2, got {value}"):
            load_generator(path)


def test_an_empty_second_set_is_none(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, replace(generator, realistic={"unet": PartWeights(), "vae": PartWeights()}))
    loaded = load_generator(path)
    assert (loaded.info.format_version, loaded.realistic) == (1, {})


def test_a_second_set_for_one_network(tmp_path, two_sets: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, replace(two_sets, realistic={"vae": two_sets.realistic["vae"]}))
    loaded = load_generator(path)
    assert loaded.has_two_sets
    assert not loaded.sets("unet")[1]
    assert loaded.sets("vae")[1].lora


def test_inspection_tells_both_sets(tmp_path, two_sets: Generator, generator: Generator) -> None:
    def shown(held: Generator) -> dict[str, str]:
        save_generator(tmp_path / "generator.safetensors", held)
        lines = file_report(tmp_path / "generator.safetensors").splitlines()
        return dict(re.split(" {2,}", line, maxsplit=1) for line in lines)

    rows = shown(two_sets)
    assert rows["kind"] == "generator file, format version 2"
    assert "faithful" in rows["fidelity"]
    assert rows["faithful LoRA"] == "rank 4, alpha 4"
    assert rows["realistic LoRA"] == "rank 2, alpha 3"
    assert rows["realistic unet"].startswith("5 replaced tensors")
    assert "LoRA on 5 modules" in rows["realistic unet"]
    assert "LoRA on 2 modules" in rows["realistic vae"]
    assert rows["realistic training"] == '{"loss": "icm"}'
    rows = shown(generator)
    assert {"unet", "vae", "LoRA"} <= rows.keys()
    assert not [name for name in rows if "realistic" in name or name == "fidelity"]


def test_a_generator_may_have_neither_lora_nor_embedding(tmp_path) -> None:
    path = tmp_path / "generator.safetensors"
    weights = PartWeights(tensors={"a": torch.ones(2)})
    save_generator(path, Generator(GeneratorInfo("nano", 0, "eps"), weights, PartWeights()))
    loaded = load_generator(path)
    assert loaded.prompt_embedding is None
    assert loaded.info.rank == 0
    assert not loaded.vae
    assert loaded.unet.tensors["a"].tolist() == [1, 1]


def test_unknown_keys_of_the_description_are_left_out(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    rewrite(path, description=lambda values: values | {"colour": "blue"})
    assert load_generator(path).info == replace(generator.info, training={})


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, generator: Generator) -> None:
    path = tmp_path / "generator.safetensors"
    save_generator(path, generator)
    before = path.read_bytes()
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"a": shared, "b": shared}, {})
    assert path.read_bytes() == before
    with pytest.raises(TypeError):
        write_tensors(path, {"a": shared}, {"number": 1})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path) -> None:
    target = tmp_path / "generator.safetensors"
    (target / "a folder of that name").mkdir(parents=True)
    with pytest.raises(IcmsrError, match=r"generator\.safetensors: cannot be written"):
        write_tensors(target, {"a": torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == [target]


def test_writing_replaces_the_old_file(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    for value in (1.0, 2.0):
        write_tensors(path, {"a": torch.full((3, 2), value).T}, {"k": "v"})
        assert load_file(path)["a"].unique().item() == value
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_in_eight_bits_is_read(tmp_path, generator: Generator) -> None:
    save_generator(tmp_path / "a.safetensors", generator)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = file.metadata()
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(tmp_path / "a.safetensors").items()}
    save_file(tensors, tmp_path / "b.safetensors", metadata=about)
    read = load_generator(tmp_path / "b.safetensors")
    assert {value.dtype for value in read.unet.tensors.values()} <= {torch.float8_e4m3fn}
    tensors[next(iter(tensors))].view(torch.uint8).fill_(0x7F)  # not a number
    save_file(tensors, tmp_path / "b.safetensors", metadata=about)
    with pytest.raises(IcmsrError, match="NaN or infinite values"):
        load_generator(tmp_path / "b.safetensors")
