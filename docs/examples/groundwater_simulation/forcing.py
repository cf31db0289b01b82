"""Forcing of the aquifer over time: recharge, boundary stages and well rates."""

from __future__ import annotations

import dataclasses

import numpy as np

from .grid import Floats
from .settings import SimulationSettings

YEAR_DAYS = 365.25
# Ratio of the largest to the mean concentration of the recharge.
PEAK_LOAD = 1.6


@dataclasses.dataclass(frozen=True)
class Forcing:
    """Forcing per stress period; ``P = 1 + warmup_steps + n_steps``, and period 0 is steady.

    Attributes
    ----------
    recharge : ndarray of float64, (P,)
        Mean recharge over the aquifer, metres per day.
    recharge_concentration : ndarray of float64, (P,)
        Concentration of the recharge, grams per cubic metre.
    inflow_shift, river_shift : ndarray of float64, (P,)
        Difference of the western and the eastern boundary stage to its mean, metres.
    well_rates : ndarray of float64, (P, W)
        Rate of each well in the order of `Aquifer.wells`, cubic metres per day; negative for
        pumping, 0 if off.
    """

    recharge: Floats
    recharge_concentration: Floats
    inflow_shift: Floats
    river_shift: Floats
    well_rates: Floats


def build_forcing(settings: SimulationSettings, seed: int) -> Forcing:
    """Draw the forcing of all stress periods.

    Recharge is its mean times a seasonal cosine that peaks in mid-winter (day 0), times weather, a
    gamma variate of mean 1 and shape 5. Stages follow the season with a lag, plus first-order
    autoregressive noise. A well is on and off in turns of 3 to 8 periods, with a new rate each time
    it is on. In the steady period everything is at its mean and all wells are off.

    Parameters
    ----------
    settings : SimulationSettings
        Means and amplitudes.
    seed : int
        0 to 2^63 - 1.

    Returns
    -------
    Forcing
        Values with the precision of the MODFLOW input files.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(4)[3])
    periods = settings.warmup_steps + settings.n_steps
    phase = 2 * np.pi * (np.arange(periods) + 0.5) * settings.step_days / YEAR_DAYS
    weather = rng.gamma(5.0, 1 / 5.0, periods)
    recharge = settings.recharge * (1 + settings.recharge_swing * np.cos(phase)) * weather
    load = settings.recharge_concentration * (1 + (PEAK_LOAD - 1) * np.cos(phase - 0.4))
    inflow = settings.stage_swing * (np.cos(phase - 1.1) + _noise(rng, periods))
    river = settings.stage_swing * (np.cos(phase - 0.6) + _noise(rng, periods))
    rates = [_well_rates(rng, periods, -settings.pumping_rate) for _ in range(settings.n_pumping)]
    for _ in range(settings.n_injection):
        rates.append(_well_rates(rng, periods, settings.injection_rate, starts_on=True))
    wells = np.array(rates).reshape(-1, periods).T
    return Forcing(
        recharge=_with_steady(recharge, settings.recharge, 8),
        recharge_concentration=_with_steady(load, settings.recharge_concentration, 4),
        inflow_shift=_with_steady(inflow, 0.0, 4),
        river_shift=_with_steady(river, 0.0, 4),
        well_rates=np.concatenate([np.zeros((1, wells.shape[1])), np.round(wells, 2)]),
    )


def _with_steady(values: Floats, mean: float, digits: int) -> Floats:
    return np.round(np.concatenate([[mean], values]), digits)


def _noise(rng: np.random.Generator, periods: int) -> Floats:
    shocks = 0.12 * rng.standard_normal(periods)
    noise = np.empty(periods)
    state = 0.0
    for i, shock in enumerate(shocks):
        state = 0.7 * state + shock
        noise[i] = state
    return noise


def _well_rates(
    rng: np.random.Generator, periods: int, rate: float, *, starts_on: bool = False
) -> Floats:
    rates = np.zeros(periods)
    is_on = starts_on or bool(rng.integers(2))
    start = 0
    while start < periods:
        stop = start + int(rng.integers(3, 9))
        if is_on:
            rates[start:stop] = rate * rng.uniform(0.6, 1.4)
        start = stop
        is_on = not is_on
    return rates
