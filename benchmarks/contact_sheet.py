"""Puts crops of the same pictures from several folders into one labelled picture.

    python benchmarks/contact_sheet.py --out sheet.png --crop 192 --zoom 2 \
        --columns "input=data/lr" "bicubic=results/bicubic" "nano=results/nano" "truth=data/hr" \
        --rows Canon_001 Canon_004:64,128

Rows are file names, with or without extension, each with the crop's corner in the largest picture (the middle without
one). Smaller pictures, such as inputs, are enlarged by repeating pixels. Needs the installed package (`uv sync`, or
`pip install -e .`). Exit codes: 0 done, 1 something failed (said in one line), 2 wrong usage.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _command_line import run_benchmark

from icmsr_core.errors import IcmsrError
from icmsr_core.pictures.contact_sheet import SheetColumn, SheetRow, SheetSettings, contact_sheet
from icmsr_core.pictures.files import Picture, write_picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the sheet that the command line describes and returns the exit code."""
    parser = argparse.ArgumentParser(description="Crops of the same pictures from several folders, in one picture.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG, JPEG, WebP or TIFF to write")
    parser.add_argument("--columns", nargs="+", required=True, metavar="TITLE=FOLDER", help="folders, left to right")
    parser.add_argument(
        "--rows",
        nargs="+",
        required=True,
        metavar="NAME[:X,Y]",
        help="pictures, top to bottom, and the crop's upper left corner in the largest one",
    )
    parser.add_argument(
        "--crop",
        type=int,
        default=SheetSettings.crop,
        metavar="N",
        help="side of the crop in pixels of the largest picture (default %(default)s)",
    )
    parser.add_argument(
        "--zoom",
        type=int,
        default=SheetSettings.zoom,
        metavar="N",
        help="each pixel becomes N x N (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        sheet = contact_sheet(
            [SheetColumn.parse(text) for text in options.columns],
            [SheetRow.parse(text) for text in options.rows],
            SheetSettings(crop=options.crop, zoom=options.zoom),
        )
        write_picture(options.out, Picture(rgb=sheet))
    except IcmsrError as error:
        print(f"contact_sheet: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out} ({sheet.shape[1]} x {sheet.shape[0]})")
    return 0


if __name__ == "__main__":
    sys.exit(run_benchmark(main))
