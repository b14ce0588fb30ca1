"""Standard output and error that a message never fails on."""

from __future__ import annotations

import io
import sys


def escape_unprintable() -> None:
    """From now on, characters that standard output or error cannot encode are written as escapes (``\\u56fe``).

    A redirected stream under Windows has the encoding of the system's region, which lacks most of the world's file
    names; by default a message with such a name raises UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None under pythonw, other objects under test runners and in IDEs
            stream.reconfigure(errors="backslashreplace")
