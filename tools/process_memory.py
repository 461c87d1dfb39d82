"""What Linux tells of the memory of a process."""

import re
from pathlib import Path


def memory_of(field: str, process: int | str = "self") -> int | None:
    """Returns bytes of a process: `RssAnon` is memory that is no mapped file, `VmHWM` the most that it ever held.

    None where the process has ended, and on other systems.
    """
    try:
        told = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", told, re.MULTILINE)
    return 1024 * int(found[1]) if found else None
