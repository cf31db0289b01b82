"""The aquifer that is simulated: grid, outline, layers, conductivity and wells, all from a seed."""

from __future__ import annotations

import dataclasses

import numpy as np

from .grid import Bools, Floats, Ints, connected_pieces, shift_mask, stretched_edges
from .settings import SimulationSettings


@dataclasses.dataclass(frozen=True)
class Well:
    """A well: its cell and whether it injects.

    Attributes
    ----------
    layer, row, col : int
        Cell, counted from 0; layer 0 is the top, row 0 the north, column 0 the west.
    injects : bool
        True for a well that puts solute in, False for one that pumps.
    """

    layer: int
    row: int
    col: int
    injects: bool


@dataclasses.dataclass(frozen=True)
class Aquifer:
    """Geometry and properties of the aquifer.

    Elevations are metres, conductivities metres per day. ``R``, ``K``, ``L`` are rows, columns and
    layers.

    Attributes
    ----------
    x_edges : ndarray of float64, (K + 1,)
        Cell edges from west to east, rising.
    y_edges : ndarray of float64, (R + 1,)
        Cell edges from north to south, falling.
    top : ndarray of float64, (R, K)
        Land surface.
    bottoms : ndarray of float64, (L, R, K)
        Layer bottoms.
    active : ndarray of bool, (R, K)
        Columns that belong to the aquifer: one piece, joined face to face.
    conductivity : ndarray of float64, (L, R, K)
        Horizontal hydraulic conductivity.
    recharge_factor : ndarray of float64, (R, K)
        Recharge over its mean, from land use; mean 1 over the active columns.
    base_head : ndarray of float64, (R, K)
        Sloping plane that heads start from.
    inflow, river : ndarray of int64, (n, 2)
        Row and column of the boundary columns in the west and in the east.
    wells : tuple of Well
        Pumping wells first, then injection wells.
    """

    x_edges: Floats
    y_edges: Floats
    top: Floats
    bottoms: Floats
    active: Bools
    conductivity: Floats
    recharge_factor: Floats
    base_head: Floats
    inflow: Ints
    river: Ints
    wells: tuple[Well, ...]

    @property
    def x(self) -> Floats:
        """Column centres, (K,), metres east of the western edge."""
        return 0.5 * (self.x_edges[1:] + self.x_edges[:-1])

    @property
    def y(self) -> Floats:
        """Row centres, (R,), metres north of the southern edge, falling."""
        return 0.5 * (self.y_edges[1:] + self.y_edges[:-1])

    @property
    def tops(self) -> Floats:
        """Layer tops, (L, R, K)."""
        return np.concatenate([self.top[None], self.bottoms[:-1]])

    @property
    def centres(self) -> Floats:
        """Elevation of the cell centres, (L, R, K): half way from a layer's top to its bottom."""
        return 0.5 * (self.tops + self.bottoms)


def build_aquifer(settings: SimulationSettings, seed: int) -> Aquifer:
    """Draw an aquifer from a seed.

    log K is a Gaussian random field with an exponential or Gaussian covariance, made by gstools'
    randomisation method (Heße, Prykhodko, Schlüter and Attinger 2014, Environmental Modelling &
    Software 55, 32-48); so are the land surface, the layer bottoms and the recharge pattern.

    Parameters
    ----------
    settings : SimulationSettings
        Sizes and properties.
    seed : int
        0 to 2^63 - 1. Every part draws from a generator of its own, spawned from this seed.

    Returns
    -------
    Aquifer
        The aquifer. Coordinates are whole centimetres, elevations whole millimetres and
        conductivities have six significant digits, so that the text which MODFLOW reads carries
        exactly these numbers.

    Raises
    ------
    ImportError
        If gstools is not installed.
    ValueError
        If the outline has no room for the wells.
    """
    streams = np.random.SeedSequence(seed).spawn(4)
    outline_rng, wells_rng, fields_rng = (np.random.default_rng(s) for s in streams[:3])
    well_locations = _well_locations(settings, wells_rng)
    width = 0.09
    x_edges = stretched_edges(
        settings.length_x, settings.n_cols, well_locations[:, 0], settings.refinement, width
    )
    y_edges = stretched_edges(
        settings.length_y, settings.n_rows, well_locations[:, 1], settings.refinement, width
    )[::-1]
    x = 0.5 * (x_edges[1:] + x_edges[:-1])
    y = 0.5 * (y_edges[1:] + y_edges[:-1])
    grid_x, grid_y = np.meshgrid(x, y)
    active = _outline(settings, outline_rng)
    base = settings.datum + settings.gradient * (settings.length_x - grid_x)
    top, bottoms = _layers(settings, grid_x, grid_y, base, fields_rng)
    surfaces = np.concatenate([top[None], bottoms])
    log_k = _log_conductivity(settings, grid_x, grid_y, surfaces, fields_rng)
    conductivity = np.array([float(f"{v:.5e}") for v in np.exp(log_k).ravel()])
    pattern = np.exp(0.35 * _surface(settings, grid_x, grid_y, fields_rng))
    pattern = np.round(pattern / pattern[active].mean(), 4)
    inflow, river = _boundary_columns(active)
    return Aquifer(
        x_edges=x_edges,
        y_edges=y_edges,
        top=top,
        bottoms=bottoms,
        active=active,
        conductivity=conductivity.reshape(log_k.shape),
        recharge_factor=pattern,
        base_head=np.round(base, 3),
        inflow=inflow,
        river=river,
        wells=_place_wells(settings, well_locations, x, y, active),
    )


def _well_locations(settings: SimulationSettings, rng: np.random.Generator) -> Floats:
    """Draw fractions of the extent, spread by best-candidate sampling, injection upstream."""
    locations: list[Floats] = []
    pumping = [(0.42, 0.78)] * settings.n_pumping
    for low, high in pumping + [(0.2, 0.42)] * settings.n_injection:
        candidates = np.column_stack([rng.uniform(low, high, 30), rng.uniform(0.28, 0.72, 30)])
        distance = np.full(30, np.inf)
        for location in locations:
            distance = np.minimum(distance, np.hypot(*(candidates - location).T))
        locations.append(candidates[int(np.argmax(distance))])
    return np.array(locations).reshape(-1, 2)


def _outline(settings: SimulationSettings, rng: np.random.Generator) -> Bools:
    # In rows and columns, not metres: the wide cells at the rim would stand out as arms.
    cols, rows = settings.n_cols, settings.n_rows
    u, v = np.meshgrid(
        (2.0 * np.arange(cols) + 1.0) / cols - 1.0, 1.0 - (2.0 * np.arange(rows) + 1.0) / rows
    )
    theta = np.arctan2(v, u)
    bumps = np.ones_like(u)
    for order in range(2, 6):
        bumps += rng.uniform(0.03, 0.09) * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
    level = (np.abs(u) ** 3 + np.abs(v) ** 3) ** (1 / 3) / bumps
    is_active = np.zeros(level.size, dtype=np.bool_)
    is_active[np.argsort(level, axis=None, kind="stable")[: settings.n_active]] = True
    return connected_pieces(is_active.reshape(level.shape))[0]


def _draw_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 2**31))


def _surface(
    settings: SimulationSettings, x: Floats, y: Floats, rng: np.random.Generator
) -> Floats:
    """Draw a smooth map of mean 0 and variance 1."""
    import gstools as gs

    scale = 0.18 * min(settings.length_x, settings.length_y)
    field = gs.SRF(gs.Gaussian(dim=2, var=1.0, len_scale=scale), seed=_draw_seed(rng))
    values = np.asarray(field((x.ravel(), y.ravel())), dtype=np.float64)
    # Three standard deviations bound the surfaces, so that no two layers can cross.
    return np.clip(values.reshape(x.shape), -3.0, 3.0)


def _layers(
    settings: SimulationSettings, x: Floats, y: Floats, base: Floats, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    depth = settings.layer_thickness * np.arange(settings.n_layers + 1)
    surfaces = [
        base + settings.freeboard - d + settings.undulation * _surface(settings, x, y, rng)
        for d in depth
    ]
    rounded = np.round(np.stack(surfaces), 3)
    # At the bound of the undulation two surfaces may touch; a cell needs a volume.
    min_thickness = round(0.1 * settings.layer_thickness, 3)
    for k in range(1, len(rounded)):
        rounded[k] = np.round(np.minimum(rounded[k], rounded[k - 1] - min_thickness), 3)
    return rounded[0], rounded[1:]


def _log_conductivity(
    settings: SimulationSettings,
    x: Floats,
    y: Floats,
    surfaces: Floats,
    rng: np.random.Generator,
) -> Floats:
    import gstools as gs

    model = {"exponential": gs.Exponential, "gaussian": gs.Gaussian}[settings.covariance](
        dim=3,
        var=settings.log_variance,
        len_scale=list(settings.correlation_lengths),
        angles=np.deg2rad(settings.correlation_angle),
    )
    field = gs.SRF(model, mean=float(np.log(settings.mean_conductivity)), seed=_draw_seed(rng))
    z = 0.5 * (surfaces[1:] + surfaces[:-1])
    xyz = (np.broadcast_to(x, z.shape).ravel(), np.broadcast_to(y, z.shape).ravel(), z.ravel())
    return np.asarray(field(xyz), dtype=np.float64).reshape(z.shape)


def _boundary_columns(active: Bools) -> tuple[Ints, Ints]:
    """Columns at the western and eastern end of the rows, within a quarter of the extent."""
    rows = np.flatnonzero(active.any(axis=1))
    first = active[rows].argmax(axis=1)
    last = active.shape[1] - 1 - active[rows, ::-1].argmax(axis=1)
    quarter = max(1, (last.max() - first.min()) // 4)
    west, east = first <= first.min() + quarter, last >= last.max() - quarter
    return (
        np.column_stack([rows[west], first[west]]).astype(np.int64),
        np.column_stack([rows[east], last[east]]).astype(np.int64),
    )


def _place_wells(
    settings: SimulationSettings, locations: Floats, x: Floats, y: Floats, active: Bools
) -> tuple[Well, ...]:
    interior = active.copy()
    for d_row, d_col in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        interior &= shift_mask(active, d_row, d_col)
    rows, cols = np.nonzero(interior)
    if len(rows) < len(locations):
        raise ValueError(
            f"n_pumping + n_injection must be <= the columns inside the aquifer ({len(rows)}), "
            f"got {len(locations)}"
        )
    free = np.ones(len(rows), dtype=np.bool_)
    wells = []
    for i, (u, v) in enumerate(locations):
        distance = np.hypot(x[cols] - u * settings.length_x, y[rows] - v * settings.length_y)
        nearest = int(np.argmin(np.where(free, distance, np.inf)))
        free[nearest] = False
        injects = i >= settings.n_pumping
        layer = 0 if injects else settings.n_layers - 1
        wells.append(Well(layer, int(rows[nearest]), int(cols[nearest]), injects))
    return tuple(wells)
