"""A small GINO of neuraloperator, and a segment_csr that is fast without torch-scatter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpusampler.demo.loading import DemoData, persistence

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class GinoConfig:
    """Sizes of a GINO that trains in seconds on one core.

    Attributes
    ----------
    hidden, layers : int
        Number of channels and of blocks of the Fourier neural operator.
    modes : int
        Number of Fourier modes per axis.
    embed : int
        Number of frequencies of the positional embedding.
    mlp : tuple of int
        Hidden widths of the MLPs of both kernels.
    grid : int
        Number of latent nodes per axis; even.
    in_radius, out_radius : float
        Radii of the two graphs, in units of the patch's box: about two cells of the latent
        grid. Radii that cover the patch (1.6 and 5) cost 15 times as much.
    """

    hidden: int = 16
    layers: int = 2
    modes: int = 4
    embed: int = 8
    mlp: tuple[int, ...] = (32, 32)
    grid: int = 8
    in_radius: float = 0.25
    out_radius: float = 0.2


def import_gino() -> Any:
    """Return the class `neuralop.models.GINO` without changing the warning filters."""
    # On import, neuralop calls warnings.filterwarnings("once").
    with warnings.catch_warnings():
        from neuralop.models import GINO

    return GINO


class PatchGino:
    """A GINO that forecasts a patch's core points from its core and ghost points.

    The channels of the input function are the ``Tin * C`` past values of a core or ghost point and
    its location; the output is evaluated at the core points. All samples of a batch share the two
    graphs, so a batch must come from one patch. The network, ``net``, is float32 on the CPU.

    The forecast is the last input step plus a change. Heads respond nearly linearly to forcing
    (the principle of superposition), so the network returns, for each target, a change without
    forcing and one response to each forcing series' value and one to its increase since the step
    before. The change is their sum, weighted by the values and increases, in units of
    ``data.change_std``. The untrained model returns the last input step: persistence.

    ``data`` gives the windows, the columns and the number of forcing series. ``seed`` gives the
    initial weights and leaves torch's global generator unchanged.

    Examples
    --------
    >>> from gpusampler.demo.loading import load
    >>> model = PatchGino(load())
    >>> model.num_parameters > 10_000
    True
    """

    def __init__(self, data: DemoData, config: GinoConfig | None = None, seed: int = 0) -> None:
        import torch

        config = GinoConfig() if config is None else config
        gino = import_gino()
        windows, normalize = data.train.windows, data.normalize
        channels = windows.inputs * len(normalize.columns) + 3
        self._shape = windows.outputs, len(normalize.target_columns), 1 + 2 * data.num_forcing
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(seed)
            self.net: torch.nn.Module = gino(
                in_channels=channels,
                out_channels=math.prod(self._shape),
                # A "linear" kernel passes the input channels to the grid unchanged.
                fno_in_channels=channels,
                gno_coord_dim=3,
                in_gno_radius=config.in_radius,
                out_gno_radius=config.out_radius,
                fno_n_modes=(config.modes,) * 3,
                fno_hidden_channels=config.hidden,
                fno_n_layers=config.layers,
                gno_embed_channels=config.embed,
                in_gno_channel_mlp_hidden_layers=list(config.mlp),
                out_gno_channel_mlp_hidden_layers=list(config.mlp),
                gno_use_open3d=False,
                gno_use_torch_scatter=False,
            )
        with torch.no_grad():
            # Random weights give sums over the latent grid far off scale. Zeros forecast no
            # change, so the loss starts at that of persistence.
            for weight in self.net.projection.fcs[-1].parameters():
                weight.zero_()
        self.config = config
        self._normalize = data.normalize
        self.change_std = data.change_std
        axis = torch.linspace(0.0, 1.0, config.grid)
        self._grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)[None]

    @property
    def num_parameters(self) -> int:
        """Number of trainable values; a complex weight counts as two."""
        return sum(p.numel() * (2 if p.is_complex() else 1) for p in self.net.parameters())

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the forecast [B, Tout, Nc, Ct] of a collated batch."""
        import torch

        past = torch.cat([batch["core_in"], batch["ghost_in"]], dim=2)
        location = batch["location"]
        responses = self.net(
            input_geom=torch.cat([batch["core_coords"], batch["ghost_coords"]], dim=1),
            latent_queries=self._grid,
            output_queries=batch["core_coords"],
            x=torch.cat([past.transpose(1, 2).flatten(2), location], dim=2),
        ).unflatten(-1, self._shape)
        forcing = batch["forcing"]  # [B, 1 + Tout, F]
        values, increases = forcing[:, 1:], forcing.diff(dim=1)
        ones = values.new_ones(*values.shape[:2], 1)
        weights = torch.cat([ones, values, increases], dim=2)
        change = torch.einsum("bntcf,btf->btnc", responses, weights)
        return persistence(batch, self._normalize) + change * self.change_std


def segment_csr(
    src: torch.Tensor, indptr: torch.Tensor, reduction: str, use_scatter: bool = True
) -> torch.Tensor:
    """Sum or average segments of rows, as `neuralop.layers.segment_csr` does, but without a loop.

    ``src`` has the n rows, shape (n, c) or (B, n, c). ``indptr`` has the start of each of the m
    segments, then n: int64, shape (m + 1,), or (B, m + 1) with the same values for every b. The
    result has shape (m, c) or (B, m, c); an empty segment gives 0. ``use_scatter`` is in the
    original's signature and is ignored.

    Examples
    --------
    >>> import torch
    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> segment_csr(rows, torch.tensor([0, 2, 2, 3]), "mean").flatten().tolist()
    [1.5, 0.0, 3.0]
    """
    import torch

    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    splits = indptr[0] if src.ndim == 3 else indptr
    dim = src.ndim - 2
    counts = splits.diff()
    rows = torch.repeat_interleave(
        torch.arange(len(counts), device=src.device), counts, output_size=src.shape[dim]
    )
    shape = list(src.shape)
    shape[dim] = len(counts)
    out = src.new_zeros(shape).index_add(dim, rows, src)
    if reduction == "mean":
        out = out / counts.clamp(min=1).to(src.dtype).unsqueeze(-1)
    return out


@contextmanager
def fast_segment_csr() -> Iterator[None]:
    """Replace neuraloperator's `segment_csr` inside a ``with`` block.

    Without torch-scatter, neuraloperator 2.0.0 loops over points in Python, and a training step
    takes 4 to 7 times as long on one core. Results differ only by the order of summation (tests
    compare values and gradients to 1e-6). The replacement affects all threads of the process.
    """
    from importlib import import_module

    import_gino()
    # neuralop.layers may have a function of the same name, so import the module by its path.
    module: Any = import_module("neuralop.layers.integral_transform")
    original = module.segment_csr
    module.segment_csr = segment_csr
    try:
        yield
    finally:
        module.segment_csr = original
