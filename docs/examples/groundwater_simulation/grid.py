"""Grid functions: stretched cell edges, shifted maps, connected pieces of a map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def stretched_edges(
    length: float, cells: int, centres: Floats, refinement: float, width: float
) -> Floats:
    """Return cell edges that are closer together near some centres.

    The edges are equally spaced quantiles of the density
    ``1 + (refinement - 1) * max over centres c of exp(-((s - c) / width)^2 / 2)``.

    Parameters
    ----------
    length : float
        Extent, metres.
    cells : int
        Number of cells.
    centres : ndarray of float64, (n,)
        Centres of refinement, as fractions of the length; may be empty.
    refinement : float
        Intended ratio of the widest to the narrowest cell, >= 1.
    width : float
        Standard deviation of the refined zone, as a fraction of the length.

    Returns
    -------
    ndarray of float64, (cells + 1,)
        Increasing edges from 0 to ``length``, rounded to centimetres.

    Raises
    ------
    ValueError
        If cells are so narrow that two edges round to the same centimetre.
    """
    s = np.linspace(0.0, 1.0, 4097)
    closeness = np.zeros_like(s)
    for centre in centres:
        closeness = np.maximum(closeness, np.exp(-0.5 * ((s - centre) / width) ** 2))
    density = 1.0 + (refinement - 1.0) * closeness
    mass = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    edges = np.round(length * np.interp(np.linspace(0.0, mass[-1], cells + 1), mass, s), 2)
    if np.any(np.diff(edges) <= 0):
        raise ValueError(f"length must give {cells} cells of 1 cm or more, got {length} m")
    return edges


def shift_mask(mask: Bools, d_row: int, d_col: int) -> Bools:
    """Shift a map (R, K) by -1, 0 or 1 rows and columns, filled with False.

    ``out[i + d_row, j + d_col] = mask[i, j]``.
    """
    padded = np.pad(mask, 1)
    rows, cols = mask.shape
    return padded[1 - d_row : 1 - d_row + rows, 1 - d_col : 1 - d_col + cols]


def connected_pieces(mask: Bools) -> list[Bools]:
    """Split a map (R, K) into pieces connected face to face, largest first.

    Pieces of equal size are ordered by their first cell.
    """
    unassigned = mask.copy()
    pieces = []
    while unassigned.any():
        piece = np.zeros_like(mask)
        piece.flat[int(np.argmax(unassigned))] = True
        while True:
            grown = piece.copy()
            for d_row, d_col in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                grown |= shift_mask(piece, d_row, d_col)
            grown &= unassigned
            if np.array_equal(grown, piece):
                break
            piece = grown
        pieces.append(piece)
        unassigned &= ~piece
    return sorted(pieces, key=lambda piece: -int(piece.sum()))
