"""``python -m gpusampler`` and the command ``gpusampler``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit: 0 success, 2 bad input or missing package, 130 interrupted."""
    try:
        from gpusampler.cli.main import INTERRUPTED, cli
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.stderr.write("the command line needs click: pip install click\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # during the import; the commands handle it themselves
        raise SystemExit(130) from None
    try:
        cli.main(prog_name="gpusampler")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # After a Ctrl-C in exec'd source (as dataclasses use), CPython ends by the signal
            # instead of the exit code, although the interrupt was handled.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
