"""Cut a map into patches of unequal size, and find their ghost cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .aquifer import Aquifer
from .grid import Bools, Floats, Ints, connected_pieces, shift_mask
from .settings import SimulationSettings

_FACES = ((0, 1), (0, -1), (1, 0), (-1, 0))
_CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


@dataclasses.dataclass(frozen=True)
class PatchMasks:
    """The columns of one patch.

    Attributes
    ----------
    core : ndarray of bool, (R, K)
        Columns that belong to this patch only.
    ghost : ndarray of bool, (R, K)
        Active columns of other patches in the ring around the core.
    """

    core: Bools
    ghost: Bools


def cut_aquifer(aquifer: Aquifer, settings: SimulationSettings, seed: int) -> list[PatchMasks]:
    """Cut an aquifer into patches according to its settings; see `cut_patches`."""
    return cut_patches(
        aquifer.active,
        aquifer.x,
        aquifer.y,
        settings.patch_sizes,
        seed=seed,
        rings=settings.ghost_rings,
        neighbours=settings.ghost_neighbours,
    )


def cut_patches(
    active: Bools,
    x: Floats,
    y: Floats,
    sizes: Sequence[float],
    *,
    seed: int,
    rings: int = 1,
    neighbours: str = "face",
) -> list[PatchMasks]:
    """Cut the active columns of a map into patches, each with a ring of ghost columns.

    The cut is a power diagram (`power_diagram`). A piece that the outline separates from its patch
    is moved to the patch with which it shares most faces, so every patch is connected if the active
    area is.

    Parameters
    ----------
    active : ndarray of bool, (R, K)
        Columns to divide.
    x : ndarray of float64, (K,)
        Column centres, metres.
    y : ndarray of float64, (R,)
        Row centres, metres.
    sizes : sequence of float
        Relative sizes, one per patch.
    seed : int
        Seed of the sites, 0 to 2^63 - 1.
    rings : int, default 1
        Width of the ghost ring, in columns; 0 for no ghosts.
    neighbours : {"face", "corner"}, default "face"
        "corner": columns that only touch at a corner are neighbours, too.

    Returns
    -------
    list of PatchMasks
        One per entry of ``sizes``, in its order. Cores are disjoint and cover ``active``.

    Raises
    ------
    ValueError
        If there are more patches than active columns, a size is not positive, ``rings`` is
        negative or ``neighbours`` unknown.
    """
    rows, cols = np.nonzero(active)
    targets = scale_sizes(sizes, len(rows))
    points = np.column_stack([x[cols], y[rows]])
    rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(5)[4])
    labels = np.full(active.shape, -1, dtype=np.int64)
    labels[active] = power_diagram(points, targets, rng)
    _join_severed(labels, len(targets))
    return [
        PatchMasks(core, ghost_ring(core, active, rings, neighbours))
        for core in (labels == p for p in range(len(targets)))
    ]


def scale_sizes(sizes: Sequence[float], total: int) -> Ints:
    """Scale positive sizes to integers, at least 1 each, with sum ``total``, by largest remainders.

    Raises ValueError if a size is not positive or ``total`` is below ``len(sizes)``.
    """
    shares = np.asarray(sizes, dtype=np.float64)
    if shares.ndim != 1 or len(shares) == 0 or not np.all(shares > 0):
        raise ValueError(f"sizes must be positive numbers, at least one, got {list(sizes)}")
    if total < len(shares):
        raise ValueError(f"sizes must have at most {total} entries, got {len(shares)}")
    # Reserve one for each size first, so that no size rounds to 0.
    exact = (total - len(shares)) * shares / shares.sum()
    counts: Ints = np.floor(exact).astype(np.int64)
    remainder = total - len(shares) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:remainder]] += 1
    counts += 1
    return counts


def power_diagram(points: Floats, targets: Ints, rng: np.random.Generator) -> Ints:
    """Assign points to the cells of a power diagram with given numbers of points.

    A point belongs to the site with the smallest ``|point - site|^2 - weight``. Weights for given
    cell sizes exist for any sites (Aurenhammer, Hoffmann and Aronov 1998, "Minkowski-type theorems
    and least-squares clustering", Algorithmica 20, 61-76). They are found by ascending the concave
    dual, whose gradient is the number of missing points; between ascents the sites move to the
    centroids of their cells. With finitely many points the sizes are close to the targets, not
    exact.

    ``points``, float64 (n, 2), are metres; ``targets``, int64 (p,), are positive with sum n.
    Returns the cell of each point, int64 (n,); no cell is empty.
    """
    sites = _first_sites(points, len(targets), rng)
    weights = np.zeros(len(targets))
    for _ in range(15):
        labels, weights = _fit_weights(points, sites, weights, targets, rounds=120)
        counts = np.bincount(labels, minlength=len(targets))
        for axis in (0, 1):
            sums = np.bincount(labels, weights=points[:, axis], minlength=len(targets))
            sites[:, axis] = np.where(counts > 0, sums / np.maximum(counts, 1), sites[:, axis])
    labels = _fit_weights(points, sites, weights, targets, rounds=1500)[0]
    for cell in np.flatnonzero(np.bincount(labels, minlength=len(targets)) == 0):
        # If two sites coincide, one of their cells can be empty for any weights.
        is_spare = np.bincount(labels, minlength=len(targets))[labels] > 1
        squares = ((points - sites[cell]) ** 2).sum(-1)
        labels[int(np.argmin(np.where(is_spare, squares, np.inf)))] = cell
    return labels


def ghost_ring(core: Bools, active: Bools, rings: int, neighbours: str = "face") -> Bools:
    """Return the active columns (R, K) within some rings around a core, without the core.

    Rings grow through active columns only. With ``neighbours="corner"``, columns that only touch at
    a corner are neighbours, too.
    """
    if rings < 0:
        raise ValueError(f"rings must be >= 0, got {rings}")
    if neighbours not in ("face", "corner"):
        raise ValueError(f"neighbours must be one of face, corner, got {neighbours!r}")
    steps = _FACES if neighbours == "face" else _FACES + _CORNERS
    area = core
    for _ in range(rings):
        grown = area.copy()
        for d_row, d_col in steps:
            grown |= shift_mask(area, d_row, d_col)
        area = grown & active
    return area & ~core


def _first_sites(points: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Draw distant points by best-candidate sampling with ten candidates each."""
    sites = [points[rng.integers(len(points))]]
    while len(sites) < count:
        candidates = points[rng.integers(len(points), size=10)]
        squares = ((candidates[:, None] - np.array(sites)[None]) ** 2).sum(-1).min(1)
        sites.append(candidates[int(np.argmax(squares))])
    return np.array(sites)


def _fit_weights(
    points: Floats, sites: Floats, weights: Floats, targets: Ints, rounds: int
) -> tuple[Ints, Floats]:
    """Ascend the dual for some rounds; return the best labels and weights found."""
    squares = ((points[:, None] - sites[None]) ** 2).sum(-1)
    # The change of a weight, in squared metres, that moves about one point between cells.
    area = np.ptp(points[:, 0]) * np.ptp(points[:, 1]) / len(points)
    weights = weights.copy()
    best: tuple[float, Ints, Floats] | None = None
    for i in range(rounds):
        labels = np.argmin(squares - weights, axis=1)
        missing = targets - np.bincount(labels, minlength=len(targets))
        error = float(np.abs(missing).sum())
        if best is None or error < best[0]:
            best = (error, labels, weights.copy())
        if error == 0:
            break
        weights += area * missing / (1 + 4 * i / rounds)
    assert best is not None
    return best[1], best[2]


def _join_severed(labels: Ints, count: int) -> None:
    """Move all but the largest piece of each patch to the patch with which it shares most faces."""
    changed = True
    while changed:
        changed = False
        for patch in range(count):
            for piece in connected_pieces(labels == patch)[1:]:
                faces = np.zeros(count, dtype=np.int64)
                for d_row, d_col in _FACES:
                    neighbours = labels[shift_mask(piece, d_row, d_col)]
                    faces += np.bincount(neighbours[neighbours >= 0], minlength=count)
                faces[patch] = 0
                if faces.max() > 0:
                    labels[piece] = int(np.argmax(faces))
                    changed = True
