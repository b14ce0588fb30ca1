"""Runs the other scripts in forks of one process that has imported what ComfyUI imports of other people's libraries.

A request is a line of JSON on standard input: the script with its arguments, and the file for its output. The answer is
two lines: the process id of the fork, and, when it has ended, its exit code. The server ends with standard input.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
from contextlib import suppress

LIBRARIES = ("torch", "torch._dynamo", "torchvision", "transformers", "scipy.stats", "torchsde", "safetensors.torch")
"""They take seven of the ten seconds in which ComfyUI starts on one core."""


def run(arguments: list[str], log: str) -> int:
    """Exit code of the script `arguments[0]`, whose output goes to the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, stream in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, stream)
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = 1
            try:
                code = run(**json.loads(line))
            finally:
                os._exit(code)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


for name in LIBRARIES:
    with suppress(ImportError):  # another version of ComfyUI may need fewer
        importlib.import_module(name)
serve()
