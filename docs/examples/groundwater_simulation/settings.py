"""Settings of the groundwater simulation, with three presets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class SimulationSettings:
    """Settings of the MODFLOW 6 flow and transport model, and of its patches.

    Units are metres, days, grams per cubic metre (the same number in mg/L) and, for hydraulic
    conductivities, metres per day. The constructor checks every field; use ``dataclasses.replace``
    for a changed copy of a preset.

    Attributes
    ----------
    n_rows, n_cols, n_layers : int
        Number of cells from north to south, from west to east, and downwards.
    length_x, length_y : float
        Extent of the grid.
    refinement : float
        Intended ratio of the widest to the narrowest cell; cells are narrow near wells. 1 gives
        equal widths.
    active_fraction : float
        Fraction of the grid's columns that belong to the aquifer; the others are inactive.
    layer_thickness : float
        Mean thickness of a layer.
    undulation : float
        Standard deviation of the land surface and of each layer bottom; at most a sixth of
        ``layer_thickness``, so that layers do not cross.
    freeboard : float
        Mean height of the land surface above the sloping base line of the heads.
    datum : float
        Mean stage of the eastern river, from which the initial heads rise to the west.
    gradient : float
        Slope of the head from west to east, metres per metre.
    mean_conductivity : float
        Geometric mean of the horizontal hydraulic conductivity.
    log_variance : float
        Variance of the natural logarithm of the conductivity.
    correlation_lengths : tuple of float
        Correlation lengths of log K along its major, minor and vertical axis.
    correlation_angle : float
        Angle of the major axis from east, counter-clockwise, in degrees.
    covariance : {"exponential", "gaussian"}
        Covariance model of log K.
    vertical_anisotropy : float
        Ratio of vertical to horizontal conductivity.
    specific_yield, specific_storage, porosity : float
        Drainable porosity of the top layer, compressible storage per metre, mobile porosity.
    longitudinal_dispersivity, transverse_dispersivity, vertical_dispersivity : float
        Mechanical dispersion, in metres.
    recharge : float
        Mean recharge, metres per day.
    recharge_swing : float
        Ratio of the seasonal amplitude to the mean, 0 to 1.
    recharge_concentration : float
        Mean concentration of solute in the recharge; it is highest in winter.
    stage_swing : float
        Seasonal amplitude of the western inflow head and the eastern river stage, metres.
    n_pumping, n_injection : int
        Number of wells that remove water, and of wells that inject solute.
    pumping_rate, injection_rate : float
        Mean rate of a well while it is on, cubic metres per day.
    injection_concentration : float
        Concentration of the injected water.
    n_steps, warmup_steps : int
        Number of written steps, and of transient steps simulated before them.
    step_days : float
        Days between written steps, the length of a stress period.
    substeps : int
        Number of equal time steps of MODFLOW per stress period.
    patch_sizes : tuple of float
        Relative size of each patch, scaled to the number of active columns.
    ghost_rings : int
        Width, in cells, of the ring of ghost cells around a patch.
    ghost_neighbours : {"face", "corner"}
        "corner": cells that only touch at a corner are neighbours, too.

    Raises
    ------
    TypeError
        If a field has the wrong type.
    ValueError
        If a field is out of range; the message names the field, the rule and the value.
    """

    n_rows: int = 24
    n_cols: int = 24
    n_layers: int = 2
    length_x: float = 1500.0
    length_y: float = 1200.0
    refinement: float = 3.0
    active_fraction: float = 0.828
    layer_thickness: float = 12.0
    undulation: float = 1.2
    freeboard: float = 3.5
    datum: float = 100.0
    gradient: float = 0.004
    mean_conductivity: float = 35.0
    log_variance: float = 0.9
    correlation_lengths: tuple[float, float, float] = (260.0, 110.0, 14.0)
    correlation_angle: float = 20.0
    covariance: str = "exponential"
    vertical_anisotropy: float = 0.1
    specific_yield: float = 0.12
    specific_storage: float = 1e-5
    porosity: float = 0.22
    longitudinal_dispersivity: float = 8.0
    transverse_dispersivity: float = 0.8
    vertical_dispersivity: float = 0.08
    recharge: float = 0.0016
    recharge_swing: float = 0.85
    recharge_concentration: float = 12.0
    stage_swing: float = 0.6
    n_pumping: int = 3
    n_injection: int = 2
    pumping_rate: float = 1400.0
    injection_rate: float = 350.0
    injection_concentration: float = 150.0
    n_steps: int = 60
    warmup_steps: int = 8
    step_days: float = 15.0
    substeps: int = 5
    patch_sizes: tuple[float, ...] = (22, 24, 27, 30, 34, 39, 45, 26, 230)
    ghost_rings: int = 1
    ghost_neighbours: str = "face"

    def __post_init__(self) -> None:
        min_counts = {"n_rows": 5, "n_cols": 5, "n_layers": 1, "n_pumping": 0, "n_injection": 0}
        min_counts |= {"n_steps": 1, "warmup_steps": 0, "substeps": 1, "ghost_rings": 0}
        for name, minimum in min_counts.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be >= {minimum}, got {value}")
        for name in _POSITIVE.split():
            _check_number(name, getattr(self, name), above=0.0)
        for name in _NOT_NEGATIVE.split():
            _check_number(name, getattr(self, name), minimum=0.0)
        for name in _FRACTIONS.split():
            _check_number(name, getattr(self, name), above=0.0, maximum=1.0)
        _check_number("datum", self.datum)
        _check_number("correlation_angle", self.correlation_angle)
        _check_number("refinement", self.refinement, minimum=1.0)
        _check_number("recharge_swing", self.recharge_swing, minimum=0.0, maximum=1.0)
        _check_tuple("correlation_lengths", self.correlation_lengths)
        if len(self.correlation_lengths) != 3:
            count = len(self.correlation_lengths)
            raise ValueError(f"correlation_lengths must have 3 values, got {count}")
        _check_tuple("patch_sizes", self.patch_sizes)
        _check_choice("covariance", self.covariance, ("exponential", "gaussian"))
        _check_choice("ghost_neighbours", self.ghost_neighbours, ("face", "corner"))
        if self.undulation > self.layer_thickness / 6:
            raise ValueError(
                "undulation must be <= layer_thickness / 6 "
                f"({self.layer_thickness / 6:g}), got {self.undulation}"
            )
        if self.specific_yield > self.porosity:
            raise ValueError(
                f"specific_yield must be <= porosity ({self.porosity}), got {self.specific_yield}"
            )
        if len(self.patch_sizes) > self.n_active:
            raise ValueError(
                f"patch_sizes must have at most one entry per active column ({self.n_active}), "
                f"got {len(self.patch_sizes)}"
            )

    @property
    def n_active(self) -> int:
        """Intended number of active columns."""
        return round(self.active_fraction * self.n_rows * self.n_cols)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serializable dict; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SimulationSettings:
        """Create settings from the result of `to_dict`; missing fields have their default."""
        field_names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - field_names):
            raise ValueError(f"settings must be fields of {cls.__name__}, got {unknown}")
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)


_POSITIVE = """
    length_x length_y layer_thickness gradient mean_conductivity specific_storage step_days
"""
_NOT_NEGATIVE = """
    undulation freeboard log_variance
    longitudinal_dispersivity transverse_dispersivity vertical_dispersivity
    recharge recharge_concentration stage_swing
    pumping_rate injection_rate injection_concentration
"""
_FRACTIONS = "active_fraction vertical_anisotropy specific_yield porosity"


def _check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be > {above:g}, got {value}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be >= {minimum:g}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be <= {maximum:g}, got {value}")


def _check_tuple(name: str, values: object) -> None:
    if not isinstance(values, tuple) or not values:
        raise TypeError(f"{name} must be a tuple of numbers, at least one, got {values!r}")
    for i, value in enumerate(values):
        _check_number(f"{name}[{i}]", value, above=0.0)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _geometric(count: int, first: float, last: float) -> tuple[float, ...]:
    return tuple(round(first * (last / first) ** (i / (count - 1)), 2) for i in range(count))


PRESETS: dict[str, SimulationSettings] = {
    "small": SimulationSettings(),
    "medium": SimulationSettings(
        n_rows=56,
        n_cols=56,
        n_layers=3,
        length_x=3000.0,
        length_y=2600.0,
        n_pumping=5,
        n_injection=4,
        n_steps=120,
        patch_sizes=_geometric(12, 77, 451),
    ),
    "large": SimulationSettings(
        n_rows=112,
        n_cols=120,
        n_layers=4,
        active_fraction=0.845,
        length_x=6000.0,
        length_y=5200.0,
        n_pumping=10,
        n_injection=8,
        n_steps=240,
        patch_sizes=_geometric(48, 60, 600),
    ),
}


def preset_settings(name: str) -> SimulationSettings:
    """Return the settings of a preset.

    Parameters
    ----------
    name : {"small", "medium", "large"}
        ``small`` is the embedded data set (patches of about 44 to 460 points, below 1 MB);
        ``medium`` has patches of about 231 to 1,353 points, ``large`` of 240 to 2,400.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
