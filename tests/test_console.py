"""Messages with characters that the console does not know."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from icmsr_core.console import escape_unprintable
from tests.support.places import ROOT

COMMANDS = """
import sys
from icmsr_core.cli.main import main
codes = [main(line.split("|")) for line in sys.argv[1:]]
sys.stderr.write(f"codes {codes}\\n")
"""
MAIN_FUNCTIONS = {"train": "sys.exit(run_script(main))", "benchmarks": "sys.exit(run_benchmark(main))"}
"""What every script ends with: the functions that prepare the streams."""


def test_characters_that_the_encoding_lacks_become_escapes(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    escape_unprintable()
    for stream in (sys.stdout, sys.stderr):
        stream.write("Löwe 图")
        stream.flush()
        assert stream.buffer.getvalue() == "Löwe \\u56fe".encode("cp1252")


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_streams_of_other_kinds_are_left_alone(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    escape_unprintable()
    assert sys.stdout is stream


@pytest.mark.parametrize("folder", MAIN_FUNCTIONS)
def test_every_script_prepares_its_streams(folder):
    scripts = [path for path in sorted((ROOT / folder).glob("*.py")) if not path.name.startswith("_")]
    assert len(scripts) > 6
    for path in scripts:
        assert path.read_text(encoding="utf-8").endswith(f"    {MAIN_FUNCTIONS[folder]}\n"), path


@pytest.mark.long
def test_the_command_line_finishes_its_work_where_the_console_lacks_a_name(tmp_path):
    """In a folder as on a Windows machine, with the output redirected to a file: every file is written, code 0."""
    folder = tmp_path / "Bilder von Jürgen"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "图 α.png")
    commands = [
        "upscale|图 α.png|出.png",
        "conditions|图 α.png|--out|条件",
        "evaluate|--sr|条件|--hr|条件|--json|数.json",
        "export|diffusers|generator.safetensors|导出",
        "inspect|生.safetensors",
    ]
    generator = ROOT / "icmsr_core" / "assets" / "nano" / "generator.safetensors"
    for name in ("generator.safetensors", "生.safetensors"):
        (folder / name).write_bytes(generator.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *commands],
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
        timeout=240,
    )
    assert done.stderr.decode("cp1252").splitlines()[-1] == "codes [0, 0, 0, 0, 0]", done.stderr
    assert any((folder / "导出").iterdir())
    written = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert {"出.png", *(f"条件/图 α_{name}.png" for name in ("colormap", "edges", "hint"))} < written
    assert (folder / "数.json").is_file()
    assert b"\\u51fa.png" in done.stdout
    assert "图".encode() not in done.stdout
