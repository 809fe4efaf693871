"""`netdecouple` and `python -m netdecouple`: ready for Ctrl-C before all else is imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _leave)
    from netdecouple.cli import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    print("interrupted: nothing was written", file=sys.stderr, flush=True)
    if "--json" in sys.argv[1:]:
        print(f'{{"error": "interrupted: nothing was written", "exit_code": {INTERRUPTED}}}', flush=True)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
