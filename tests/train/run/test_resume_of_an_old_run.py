"""A run goes on with later code: its checkpoint of 2026-11-28 ends in the weights that the code of that day reached."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from icmsr_core.train.networks.bases import NetworkConfig
from tests.support.model_files import write_base
from tests.support.script_process import ScriptProcess

pytestmark = pytest.mark.long

OLD_RUN = Path(__file__).parent / "data" / "run_of_2026_11_28"
"""Settings, the checkpoint at 4 images and the final generator of a run of 8 images: written by the code of 2026-11-28,
before the modules moved. Its base was `write_base` of `BASE`."""
BASE = NetworkConfig(latent_channels=4, vae_channels=(32, 32), unet_channels=(32, 32), unet_self_attention=False)


def same_weights(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Equal to 1e-5 of the file's largest weight, and to one unit in the last place of the float16 in which it is kept.

    Not bit for bit: other processors, and other versions of torch, sum in another order, and AdamW turns the rounding
    of a gradient near zero into a step of up to the learning rate. Two steps of training move the weights 20 times as
    far as this tolerates.
    """
    scale = max(float(value.abs().max()) for value in wanted.values())
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name].float(), wanted[name].float(), rtol=2**-10, atol=1e-5 * scale) for name in wanted
    )


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """The folder in which the old run was taken up and finished."""
    folder = tmp_path_factory.mktemp("resumed")
    write_base(folder / "base", BASE)
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD_RUN / "config.json", folder / "run")
    shutil.copytree(OLD_RUN / "checkpoints" / "000000004", folder / "run" / "checkpoints" / "000000004")
    process = ScriptProcess("distill.py", "--config", OLD_RUN / "distill.yaml", folder=folder)
    assert process.wait() == 0, process.output()
    return folder / "run"


def test_an_old_checkpoint_goes_on_to_the_weights_that_the_old_code_reached(resumed):
    wanted = load_file(OLD_RUN / "generator.safetensors")
    assert same_weights(load_file(resumed / "generator.safetensors"), wanted)
    untouched = load_file(OLD_RUN / "checkpoints" / "000000004" / "generator.safetensors")
    assert not same_weights(untouched, wanted), "the comparison would see that nothing was trained"


def test_a_resumed_run_starts_at_the_position_of_its_checkpoint(resumed):
    lines = (resumed / "metrics.jsonl").read_text().splitlines()
    # The second line at 8 is what is measured at a checkpoint.
    assert [line.split(",")[0] for line in lines] == ['{"images": 6', '{"images": 8', '{"images": 8']
    kept = sorted(path.name for path in (resumed / "checkpoints").iterdir())
    assert kept == ["000000004", "000000008"]
    # The names in the state, by which a run finds its weights again.
    old, new = (load_file(resumed / "checkpoints" / name / "state.safetensors") for name in kept)
    assert old.keys() == new.keys()
