"""Write the MODFLOW 6 model of an aquifer with flopy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .aquifer import Aquifer
from .forcing import Forcing
from .settings import SimulationSettings

# The conductance of a boundary is K times the cell's face divided by this length, metres.
_BED_LENGTH = 40.0
_MOLECULAR_DIFFUSION = 8.64e-5  # square metres per day: 1e-9 m2/s


def write_model(
    aquifer: Aquifer, forcing: Forcing, settings: SimulationSettings, folder: Path
) -> None:
    """Write the input files of a simulation with a flow and a transport model.

    Flow (GWF): DIS, NPF with the Newton formulation (top layer convertible, the others confined),
    STO, GHB in the west, RIV in the east, WEL, RCH. Transport (GWT): MST, ADV (TVD scheme), DSP,
    SSM. A GWF-GWT exchange couples them. Units are metres, days and grams. ``folder`` must exist.
    """
    from flopy import mf6

    sim = mf6.MFSimulation(sim_name="aquifer", sim_ws=str(folder), verbosity_level=0)
    sim.simulation_data.float_precision = 9
    periods = len(forcing.recharge)
    steps = [(settings.step_days, settings.substeps, 1.0)] * (periods - 1)
    perioddata = [(1.0, 1, 1.0), *steps]
    mf6.ModflowTdis(sim, time_units="days", nper=periods, perioddata=perioddata)
    gwf = mf6.ModflowGwf(sim, modelname="gwf", newtonoptions="NEWTON", save_flows=True)
    gwt = mf6.ModflowGwt(sim, modelname="gwt", save_flows=True)
    for model, change in ((gwf, 1e-7), (gwt, 1e-6)):
        ims = mf6.ModflowIms(
            sim,
            complexity="MODERATE",
            linear_acceleration="BICGSTAB",
            outer_maximum=200,
            inner_maximum=300,
            outer_dvclose=change,
            inner_dvclose=change / 10,
            rcloserecord=[change, "STRICT"],
            filename=f"{model.name}.ims",
        )
        sim.register_ims_package(ims, [model.name])
        _write_grid(mf6, model, aquifer)
    _write_flow(mf6, gwf, aquifer, forcing, settings)
    _write_transport(mf6, gwt, settings)
    mf6.ModflowGwfgwt(sim, exgtype="GWF6-GWT6", exgmnamea="gwf", exgmnameb="gwt")
    sim.write_simulation(silent=True)


def _write_grid(mf6: Any, model: Any, aquifer: Aquifer) -> None:
    layers, rows, cols = aquifer.bottoms.shape
    dis = mf6.ModflowGwfdis if model.name == "gwf" else mf6.ModflowGwtdis
    dis(
        model,
        length_units="meters",
        nlay=layers,
        nrow=rows,
        ncol=cols,
        delr=np.round(np.diff(aquifer.x_edges), 2),
        delc=np.round(-np.diff(aquifer.y_edges), 2),
        top=aquifer.top,
        botm=aquifer.bottoms,
        idomain=np.broadcast_to(aquifer.active, aquifer.bottoms.shape).astype(np.int32),
    )
    variable = "HEAD" if model.name == "gwf" else "CONCENTRATION"
    control = mf6.ModflowGwfoc if model.name == "gwf" else mf6.ModflowGwtoc
    records = {f"{variable.lower()}_filerecord": f"{model.name}.bin"}
    control(model, saverecord=[(variable, "LAST")], printrecord=[("BUDGET", "LAST")], **records)


def _write_flow(
    mf6: Any, gwf: Any, aquifer: Aquifer, forcing: Forcing, settings: SimulationSettings
) -> None:
    layers = settings.n_layers
    convertible = [1] + [0] * (layers - 1)
    k = aquifer.conductivity
    mf6.ModflowGwfic(gwf, strt=np.broadcast_to(aquifer.base_head, k.shape))
    mf6.ModflowGwfnpf(
        gwf, icelltype=convertible, k=k, k33=settings.vertical_anisotropy, k33overk=True
    )
    mf6.ModflowGwfsto(
        gwf,
        iconvert=convertible,
        sy=settings.specific_yield,
        ss=settings.specific_storage,
        steady_state={0: True},
        transient={1: True},
    )
    series = _recharge_series(forcing, settings)
    rows, cols = np.nonzero(aquifer.active)
    recharge = [
        [(0, int(i), int(j)), "recharge", float(aquifer.recharge_factor[i, j]), "load"]
        for i, j in zip(rows, cols, strict=True)
    ]
    mf6.ModflowGwfrch(
        gwf,
        auxiliary=["factor", "concentration"],
        auxmultname="factor",
        maxbound=len(recharge),
        stress_period_data=recharge,
        timeseries=series,
        pname="rch",
    )
    _write_boundaries(mf6, gwf, aquifer, forcing)
    if not aquifer.wells:
        return
    rates = {
        period: [
            [(w.layer, w.row, w.col), float(rate), w.injects * settings.injection_concentration]
            for w, rate in zip(aquifer.wells, forcing.well_rates[period], strict=True)
        ]
        for period in range(len(forcing.well_rates))
    }
    mf6.ModflowGwfwel(
        gwf,
        auxiliary=["concentration"],
        maxbound=len(aquifer.wells),
        stress_period_data=rates,
        pname="wel",
    )


def _recharge_series(forcing: Forcing, settings: SimulationSettings) -> dict[str, Any]:
    ends = 1.0 + settings.step_days * np.arange(len(forcing.recharge))
    starts = np.concatenate([[0.0], ends[:-1], [ends[-1] + 1.0]])
    values = np.column_stack([forcing.recharge, forcing.recharge_concentration])
    # A stepwise series must extend past the last time step, so the last value is repeated.
    values = np.concatenate([values, values[-1:]])
    return {
        "filename": "recharge.ts",
        "timeseries": [
            (float(t), float(r), float(c)) for t, (r, c) in zip(starts, values, strict=True)
        ],
        "time_series_namerecord": ["recharge", "load"],
        "interpolation_methodrecord": ["stepwise", "stepwise"],
    }


def _write_boundaries(mf6: Any, gwf: Any, aquifer: Aquifer, forcing: Forcing) -> None:
    face = -np.diff(aquifer.y_edges)[:, None] * (aquifer.tops - aquifer.bottoms)
    conductance = aquifer.conductivity * face / _BED_LENGTH
    inflow: dict[int, list[Any]] = {}
    river: dict[int, list[Any]] = {}
    for period in range(len(forcing.recharge)):
        inflow[period] = [
            [
                (layer, int(i), int(j)),
                round(float(aquifer.base_head[i, j] + forcing.inflow_shift[period]), 4),
                float(f"{conductance[layer, i, j]:.5e}"),
            ]
            for layer in range(len(conductance))
            for i, j in aquifer.inflow
        ]
        river[period] = []
        for i, j in aquifer.river:
            stage = float(aquifer.base_head[i, j] + forcing.river_shift[period])
            bed = max(float(aquifer.bottoms[0, i, j]), float(aquifer.base_head[i, j]) - 4.0)
            leakage = float(f"{conductance[:, i, j].sum():.5e}")
            river[period].append([(0, int(i), int(j)), round(stage, 4), leakage, round(bed, 4)])
    mf6.ModflowGwfghb(gwf, maxbound=len(inflow[0]), stress_period_data=inflow, pname="ghb")
    mf6.ModflowGwfriv(gwf, maxbound=len(river[0]), stress_period_data=river, pname="riv")


def _write_transport(mf6: Any, gwt: Any, settings: SimulationSettings) -> None:
    mf6.ModflowGwtic(gwt, strt=0.25 * settings.recharge_concentration)
    mf6.ModflowGwtmst(gwt, porosity=settings.porosity)
    mf6.ModflowGwtadv(gwt, scheme="TVD")
    mf6.ModflowGwtdsp(
        gwt,
        xt3d_off=True,
        diffc=_MOLECULAR_DIFFUSION,
        alh=settings.longitudinal_dispersivity,
        ath1=settings.transverse_dispersivity,
        atv=settings.vertical_dispersivity,
    )
    sources = [("rch", "AUX", "concentration")]
    if settings.n_pumping + settings.n_injection:
        sources.append(("wel", "AUX", "concentration"))
    mf6.ModflowGwtssm(gwt, sources=sources)
