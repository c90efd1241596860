"""`python -m fastjepa.apart PARENT COMMAND...`: a command of fastjepa that gives way to others.

It has the lowest priority on the processor, and ends as soon as PARENT, the process that started it, is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence

from fastjepa.cli import main

LOOKS = 1.0  # seconds between looks at the parent


def run(argv: Sequence[str]) -> int:
    """Run the command as a child of the process with the number `argv[0]`; its exit status."""
    if hasattr(os, "nice"):
        os.nice(19)
    threading.Thread(target=_end_with, args=(int(argv[0]),), daemon=True).start()
    return main(argv[1:])


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOKS)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
