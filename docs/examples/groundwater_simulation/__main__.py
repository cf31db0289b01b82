"""The command ``python -m groundwater_simulation``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .modflow_run import SimulationError
from .simulate import DEFAULT_SEED, simulate

PROGRAM = "groundwater_simulation"
INTERRUPTED = 130


class OneLineErrors(click.Command):
    """A command whose errors are one line on stderr and exit code 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command and exit."""
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except click.ClickException as error:
            click.echo(f"{PROGRAM}: {' '.join(error.format_message().split())}", err=True)
            sys.exit(2)
        except click.Abort:  # click's name for Ctrl-C
            sys.exit(INTERRUPTED)
        sys.exit(code)


@click.command(PROGRAM, cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--preset", default="small", show_default=True, help="Size: small, medium or large.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to create.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=DEFAULT_SEED,
    show_default=True,
    help="Seed of the simulation.",
)
@click.option("--mf6", type=click.Path(path_type=Path), help="The MODFLOW 6 program.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier simulation in --out.")
def main(preset: str, out: Path, seed: int, mf6: Path | None, overwrite: bool) -> None:
    """Simulate an aquifer with MODFLOW 6 and cut it into patches."""
    try:
        folder = simulate(out, preset, seed=seed, mf6=mf6, overwrite=overwrite)
    except (SimulationError, ImportError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"written: {folder}")


if __name__ == "__main__":
    main()
