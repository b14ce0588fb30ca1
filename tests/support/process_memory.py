"""What Linux says of the memory of the process that asks."""

import re
from pathlib import Path


def memory(what: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most so far).

    Not ru_maxrss, which a new program inherits from the one that started it.
    """
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found[1])
