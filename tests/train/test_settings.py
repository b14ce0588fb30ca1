"""A run's settings: what a resume compares, what files keep, and what an exported file tells others."""

import importlib
import json
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from safetensors import safe_open

import icmsr_core.train
from icmsr_core.train.run.launch import parse_config
from icmsr_core.train.run.state import fingerprint
from icmsr_core.train.settings import PATH_KEYS, compared_settings, plain_settings, shareable
from tests.support.script_process import load_script

OLD_RUN = Path(__file__).parent / "run" / "data" / "run_of_2026_11_28"
CAME_LATER = {
    "distill": {
        "data.enlarge",
        "latents.pairs",
        "latents.precision",
        "teacher_test",
        "generator.networks.train_encoder",
        "generator.networks.continue_realistic",
        "generator.networks.start_fidelity",
        "generator.networks.start_base",
        "generator.losses.latent",
        "generator.perceptual.precision",
        "generator.perceptual.dists_weights",
        "generator.perceptual.shift",
        "generator.perceptual.split",
        "generator.losses.dists",
        "generator.losses.lattice",
    },
    "adapter": {"data.enlarge"},
    "prior": {"data.enlarge", "latents.precision"},
}
NEW_AND_FREE = {"loop.changed_photographs"}
FREE_IN_A_LOOP = {
    "batch",
    "accumulate",
    "workers",
    "log_every",
    "save_every",
    "keep",
    "tensorboard",
    "patience",
    "changed_photographs",
}


def names(settings: Mapping[str, object], above: str = "") -> set[str]:
    """Dotted names of all settings."""
    found: set[str] = set()
    for key, value in settings.items():
        found |= names(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}"}
    return found


@pytest.mark.parametrize(
    ("script", "loops"), [("adapter", ["loop"]), ("distill", ["loop"]), ("prior", ["autoencoder", "prior"])]
)
def test_a_resume_compares_everything_but_what_changes_no_weight(script, loops, monkeypatch):
    config = load_script(script, monkeypatch).Config("runs/a")
    free = names(plain_settings(config)) - names(compared_settings(config))
    in_loops = {f"{loop}.{key}" for loop in loops for key in FREE_IN_A_LOOP}
    assert free == {"run", "device", "data.cache_mb"} | in_loops | CAME_LATER.get(script, set())


@pytest.mark.parametrize(
    "flag",
    [
        "--data.enlarge=2",
        "--latents.pairs=8",
        "--teacher_test=true",
        "--generator.networks.train_encoder=false",
        "--generator.networks.continue_realistic=true",
        "--generator.networks.start_fidelity=0.5",
        "--generator.networks.start_base=base",
        "--generator.losses.latent=1",
    ],
)
def test_a_setting_that_came_later_is_compared_once_it_leaves_its_default(flag, monkeypatch):
    weights = "whole" if "start_" in flag else "lora"
    basis = ["--run=a", "--generator.networks.start=generator.st", f"--generator.networks.weights={weights}"]
    kind = load_script("distill", monkeypatch).Config
    old, new = (compared_settings(parse_config(kind, [*basis, *flags])) for flags in ([], [flag]))
    assert names(new) - names(old) == {flag.removeprefix("--").split("=")[0]}
    assert all(names(new) >= {name} for name in names(old))


@pytest.mark.parametrize("script", ["adapter", "distill", "prior"])
def test_whether_a_run_is_a_dry_one_is_kept_nowhere(script, monkeypatch):
    config = load_script(script, monkeypatch).Config("runs/a", dry_run=True)
    assert "dry_run" not in plain_settings(config).keys() | compared_settings(config).keys()


def test_an_old_run_s_settings_are_still_what_is_compared_and_written(monkeypatch):
    config = parse_config(load_script("distill", monkeypatch).Config, ["--config", str(OLD_RUN / "distill.yaml")])
    with safe_open(OLD_RUN / "checkpoints" / "000000004" / "state.safetensors", "pt") as file:
        written = file.metadata()["fingerprint"]
    assert fingerprint({**compared_settings(config), "effective batch": 2}) == written
    plain, old = plain_settings(config), json.loads((OLD_RUN / "config.json").read_text())
    later = CAME_LATER["distill"] | NEW_AND_FREE
    assert names(plain) - names(old) == later
    assert fingerprint(_without(plain, later)) == fingerprint(old)


def _without(settings: Mapping[str, object], left: set[str], above: str = "") -> dict[str, object]:
    kept: dict[str, object] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            kept |= {key: inner} if (inner := _without(value, left, f"{name}.")) else {}
        elif name not in left:
            kept[key] = value
    return kept


def test_an_exported_file_carries_no_paths_of_this_machine():
    settings = {
        "run": "/home/me/runs/a",
        "device": "cuda:1",
        "base": "/models/sd21",
        "loop": {"batch": 2},
        "data": {"folders": ["/mnt/photos"], "captions": ""},
        "condition": {"prompt": "a photo/scan"},
    }
    assert shareable(settings) == {
        "base": "sd21",
        "loop": {"batch": 2},
        "data": {"folders": ["photos"], "captions": ""},
        "condition": {"prompt": "a photo/scan"},
    }


NO_PATHS = {
    *("base_dtype", "degradations", "kind", "law", "licence", "negative_prompt", "precision", "prediction", "prompt"),
    *("schedule", "small", "source", "warmup"),
}
"""Settings that hold text, but no path."""


def test_every_setting_that_may_hold_a_path_is_known_as_one():
    """Of those that weight files carry; a new setting with text in it has to be named here or there."""
    texts = set()
    for found in pkgutil.walk_packages(icmsr_core.train.__path__, "icmsr_core.train."):
        if ".experiments" in found.name:
            continue
        for settings in vars(importlib.import_module(found.name)).values():
            own = isinstance(settings, type) and settings.__module__ == found.name
            if own and is_dataclass(settings) and settings.__name__.endswith(("Config", "Weights")):
                hints = get_type_hints(settings)
                texts |= {field.name for field in fields(settings) if re.search(r"\bstr\b", str(hints[field.name]))}
    assert {"dists_weights", "start_base", "folders"} < texts
    assert texts == NO_PATHS | (set(PATH_KEYS) - {"base"})
