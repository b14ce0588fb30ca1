"""Makes the process it is imported into a ComfyUI without a server: `start` before anything else."""

import argparse
import asyncio
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

new_packages: list[str] = []
"""Packages from elsewhere that importing the pack has loaded, in `start`, into a process that had core loaded."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--pack", type=Path, required=True, help="the pack, as it lies in custom_nodes")
    parser.add_argument("--job", type=Path, required=True, help="folder with the inputs; results go there too")
    return parser.parse_args()


def start(options: argparse.Namespace):
    """Loads core's nodes and the pack with core's own loader; returns (core's nodes module, the pack's package)."""
    sys.path.insert(0, str(options.comfyui))
    sys.argv = ["main.py", "--cpu", "--base-directory", str(options.job), "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_config.config_parser  # noqa: F401  core's loader needs it

    import nodes

    before = installed_packages()
    assert asyncio.run(nodes.load_custom_node(str(options.pack))), "the pack did not load"
    new_packages.extend(sorted(installed_packages() - before))
    return nodes, sys.modules[str(options.pack).replace(".", "_x_")]


def installed_packages() -> set[str]:
    """Top-level names of the loaded modules that lie in site-packages."""
    return {
        name.partition(".")[0]
        for name, module in list(sys.modules.items())
        if "site-packages" in (getattr(module, "__file__", None) or "")
    }


def find_support(options: argparse.Namespace) -> None:
    """Makes tests.support importable: in this process, tests is a package of ComfyUI's."""
    tests = ModuleType("tests")
    tests.__path__ = [str(options.pack / "tests")]
    sys.modules["tests"] = tests


def parts_of(pack: ModuleType) -> Callable[[str], ModuleType]:
    """A function that imports a module of the pack by its name within it: the pack's own name is its path."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


def loaded_modules(pack: ModuleType) -> list[str]:
    """Names of the pack's modules that are loaded now, such as nodes.upscale."""
    return sorted(
        name.removeprefix(f"{pack.__name__}.") for name in sys.modules if name.startswith(f"{pack.__name__}.")
    )


def load_base(part: Callable[[str], ModuleType], folder: Path):
    """MODEL and VAE of a base folder, described as ICMSR_LoadEmbedded describes its own."""
    description, native_models = part("nodes.native.description"), part("nodes.native.models")
    base = part("icmsr_core.weights.base").open_base(folder)
    model, vae = native_models.load_unet(base), native_models.load_vae(base)
    about = description.ModelDescription(base.descriptor(), base.info.name, base.hash(), base.prompt_embedding())
    model.set_attachments(description.ATTACHMENT, about)
    return model, vae


def note_error(errors: dict, name: str, function, *arguments, **settings) -> None:
    """Notes under `name` the message with which `function` refuses, or None."""
    try:
        function(*arguments, **settings)
        errors[name] = None
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
