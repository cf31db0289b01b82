"""``python -m gpusampler`` and the command ``gpusampler``."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line.

    Raises
    ------
    SystemExit
        Always, with the exit code: 0 done, 2 bad usage, bad data or a missing extra, 130
        interrupted.
    """
    try:
        from gpusampler.cli.main import INTERRUPTED, cli
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.stderr.write("the command line needs click: pip install 'gpusampler[demo]'\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # while importing; the commands see to it themselves
        raise SystemExit(130) from None
    try:
        cli.main(prog_name="gpusampler")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # CPython remembers a Ctrl-C that passed through exec'd source (a library that makes a
            # dataclass), though it was handled, and would end by the signal instead of the code.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
