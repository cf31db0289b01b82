"""The command line: run the demo, or show how patch ids divide into batches."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import click

from gpusampler import __version__
from gpusampler.batching.short_batches import Partial
from gpusampler.permutation import _native

INTERRUPTED = 130


class Refusal(click.ClickException):
    """An error in the user's data, or a missing package; printed as one line, exit code 2."""

    exit_code = 2


class OneLineErrors(click.Group):
    """A command group that prints errors as one line on stderr, without a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit; without ``standalone_mode``, return and raise as click does."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "", err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            message = " ".join(error.format_message().split())
            click.echo(f"{prog_name or 'gpusampler'}: {message}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:  # click's name for Ctrl-C
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader (head, less) has closed the pipe, so nothing may be flushed to it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if _was_interrupted(error):
                sys.exit(INTERRUPTED)
            raise
        sys.exit(code if isinstance(code, int) else 0)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error, directly or through errors raised while handling it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _refusing() -> Iterator[None]:
    # Wrap only work on the user's arguments and files: bugs elsewhere keep their traceback.
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        # Leave out the error number of the operating system.
        message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise Refusal(message) from error
    except (ValueError, TypeError) as error:
        raise Refusal(str(error)) from error


def _need(task: str, *modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        packages = " ".join(missing).replace("neuralop", "neuraloperator")
        raise Refusal(f"{task} needs {', '.join(missing)}: pip install {packages}")


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """End the process on Ctrl-C while large libraries are imported.

    An interrupted import would turn the KeyboardInterrupt into a different error. Ending at once is
    safe because no file has been written.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # the program has a handler
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_DIRECTORY = click.Path(path_type=Path)


@click.group(
    "gpusampler", cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(
    __version__,
    prog_name="gpusampler",
    message="%(prog)s, version %(version)s, host evaluates in "
    # click formats the message.
    + _native.describe().replace("%", "%%"),
)
def cli() -> None:
    """Run the demo, or show how a batch size divides patches into batches."""


@cli.command()
@click.option(
    "--out",
    type=_DIRECTORY,
    default=Path("gpusampler-demo"),
    show_default=True,
    help="Folder for demo.png and report.json.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--data", type=_DIRECTORY, help="A patch folder.  [default: MODFLOW 6 output in the package]"
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the initial weights and of the batches.",
)
def demo(out: Path, epochs: int, batch_size: int, data: Path | None, seed: int) -> None:
    """Train a GINO on groundwater patches (about 20 seconds)."""
    _need("the demo", "torch", "neuralop", "matplotlib")
    with _ending_at_once():
        import matplotlib.figure  # noqa: F401

        from gpusampler.demo.gino import import_gino
        from gpusampler.demo.job import PICTURE, REPORT, run_demo
        from gpusampler.demo.loading import load

        import_gino()

    with _refusing():
        loaded = load(data)
        out.mkdir(parents=True, exist_ok=True)
    try:
        report = run_demo(loaded, out=out, epochs=epochs, batch_size=batch_size, seed=seed)
    except (OSError, FloatingPointError) as error:
        raise Refusal(str(error)) from error
    click.echo(report.text())
    click.echo(f"written     {out / PICTURE} and {out / REPORT}, {report.seconds:.0f} s in all")


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--batch-size", type=click.IntRange(min=1), required=True)
@click.option("--column", help="Column, array or dataset to read, if the file has several.")
@click.option(
    "--out", type=_DIRECTORY, help="PNG file of the picture.  [default: gpusampler-inspect.png]"
)
@click.option(
    "--input-window",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="Patch folders: input time steps per sample.",
)
@click.option(
    "--output-window",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Patch folders: output time steps per sample.",
)
@click.option(
    "--split",
    type=click.Choice(["train", "val", "all"]),
    default="train",
    show_default=True,
    help="Patch folders: part of the series.",
)
@click.option(
    "--epoch",
    type=click.IntRange(0, 2**63 - 1),
    help="Draw the batches of this epoch, by patch and in order, instead of the patch sizes.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Epochs: seed of the batches.",
)
@click.option(
    "--partial",
    type=click.Choice(get_args(Partial)),
    default="keep",
    show_default=True,
    help="Epochs: what to do with a short last batch of a patch.",
)
def inspect(
    source: Path,
    batch_size: int,
    column: str | None,
    out: Path | None,
    input_window: int,
    output_window: int,
    split: str,
    epoch: int | None,
    seed: int,
    partial: Partial,
) -> None:
    """Show patch sizes and how a batch size divides the patches into batches.

    SOURCE is a patch folder, an index file, or a file with one patch id per sample: .npy, Parquet,
    Zarr or HDF5.
    """
    from gpusampler.cli.inspect import draw, inspect_source, make_sampler
    from gpusampler.sampler import PatchBatchSampler

    if out is not None or epoch is not None:
        _need("the picture", "matplotlib")
    with _refusing():
        ids = _patch_ids(source, column, input_window, output_window, split)
        groups = PatchBatchSampler(ids, batch_size, seed=0).plan.groups
        if epoch is not None:
            sampler = make_sampler(groups, batch_size, partial, seed)
        found = inspect_source(groups, batch_size, source.name or str(source))
    click.echo(found.text())
    if out is None and find_spec("matplotlib") is None:
        click.echo("no picture: it needs matplotlib (pip install matplotlib)", err=True)
        return
    picture = Path("gpusampler-inspect.png") if out is None else out
    with _refusing():
        if epoch is None:
            draw(found, picture)
        else:
            from gpusampler.core.files import save_png
            from gpusampler.sampler.plot import plot_epoch

            save_png(plot_epoch(sampler, epoch), picture)
    click.echo(f"\nwritten: {picture}")


def _patch_ids(source: Path, column: str | None, inputs: int, outputs: int, split: str) -> Any:
    from gpusampler.groundwater import GWPatchDataset
    from gpusampler.groups.index_format import is_index
    from gpusampler.sources.dispatch import read_patch_ids

    if is_index(source):
        return source
    if source.is_dir() and any(entry.name.startswith("patch_") for entry in source.iterdir()):
        return GWPatchDataset(source, inputs, outputs, split=split)
    try:
        return read_patch_ids(source, column)
    except ValueError as error:
        if source.is_dir():
            raise ValueError(
                f"{error}. Folder {source} is not a patch folder: it has no folders patch_<id>"
            ) from None
        raise
