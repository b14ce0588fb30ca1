"""Makes the process it is imported into a ComfyUI without a server: `start` before anything else."""

import argparse
import asyncio
import sys
from pathlib import Path


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
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(options.pack))), "the pack did not load"
    return nodes, sys.modules[str(options.pack).replace(".", "_x_")]
