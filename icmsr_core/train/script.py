"""What the scripts in `train/` share: configuration from YAML and flags, exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from ..errors import IcmsrError
from .loop import Interrupted

Config = TypeVar("Config")


def parse_config(kind: type[Config], arguments: list[str] | None = None) -> Config:
    """A `kind` (a dataclass) from ``--config FILE`` and ``--key.sub=value``; wrong keys and types end with code 2."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

    parser = ArgumentParser(description=kind.__doc__)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it override its keys")
    parser.add_class_arguments(kind, None)
    values = parser.parse_args(arguments)
    values.pop("config", None)
    # Named instantiate_classes before jsonargparse 4.49.
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    config: Config = kind(**vars(instantiate(values)))
    return config


def settings_of(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain values, for JSON."""
    return asdict(config)


def run_script(main: Callable[[], None]) -> int:
    """Runs a training script: 0 done, 1 failed (one line on stderr), 130 interrupted (the loop saves its state)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except Interrupted as stop:
        logging.info("%s", stop)
        return 130
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (IcmsrError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
