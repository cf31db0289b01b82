"""Steps: what is refused, and told, by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from support.strategies import IDS, make, quiet

COSTS = {5: 1.0, -2: 2.5, 9: 1.4, 40: 7.0}
NUMBERS = (
    "patch_costs must be numbers by ascending patch id, a mapping from patch ids, or a function of "
    "the patch id, got "
)
OUT_OF_RANGE = "patch_costs must be > 0 and < 2**512, got "


@pytest.mark.parametrize(
    ("costs", "error", "text"),
    [
        ([1, 2, 3], ValueError, "one number per patch, shape (4,), got shape (3,)"),
        ([1, 2, 3, 4, 5], ValueError, "one number per patch, shape (4,), got shape (5,)"),
        (2.5, ValueError, "one number per patch, shape (4,), got shape ()"),
        (np.ones((4, 1)), ValueError, "one number per patch, shape (4,), got shape (4, 1)"),
        ([], ValueError, "one number per patch, shape (4,), got shape (0,)"),
        (
            [1, [2, 3], 4, 5],
            ValueError,
            "patch_costs must be one number per patch: setting an array",
        ),
        ({5: 1.0, 9: 2}, ValueError, "a number for every patch, got none for -2, 40"),
        (
            {"5": 1.0},
            ValueError,
            "none for -2, 5, 9, 40 (the mapping has the key '5', but the patch id is 5: convert "
            "its keys)",
        ),
        ([1, 0, 1, 1], ValueError, OUT_OF_RANGE + "0.0 for patch 5"),
        ([1, 1, -2, 1], ValueError, OUT_OF_RANGE + "-2.0 for patch 9"),
        ([1, 1, 1, -0.0], ValueError, OUT_OF_RANGE + "-0.0 for patch 40"),
        ([np.nan, 1, 1, 1], ValueError, OUT_OF_RANGE + "nan for patch -2"),
        ([1, np.inf, 1, 1], ValueError, OUT_OF_RANGE + "inf for patch 5"),
        ([1, -np.inf, 1, 1], ValueError, OUT_OF_RANGE + "-inf for patch 5"),
        ([1, 2.0**512, 1, 1], ValueError, OUT_OF_RANGE + "1.3407807929942597e+154 for patch 5"),
        ({**COSTS, 40: 0}, ValueError, OUT_OF_RANGE + "0.0 for patch 40"),
        (lambda patch_id: patch_id, ValueError, OUT_OF_RANGE + "-2.0 for patch -2"),
        (["1", "2", "3", "4"], TypeError, NUMBERS + "['1', '2', '3', '4']"),
        ("balanced", TypeError, NUMBERS + "'balanced'"),
        ([None, 1, 1, 1], TypeError, NUMBERS + "[None, 1, 1, 1]"),
        ([True, False, True, True], TypeError, NUMBERS + "[True, False, True, True]"),
        ([1j, 1, 1, 1], TypeError, NUMBERS + "[1j, 1, 1, 1]"),
        (lambda patch_id: None, TypeError, NUMBERS + "[None, None, None, None]"),
        ({**COSTS, 5: "1"}, TypeError, NUMBERS),
        ({5, -2, 9, 40}, TypeError, NUMBERS),
        (
            np.ma.masked_array([1.0, 2, 3, 4], [0, 1, 0, 0]),
            TypeError,
            "patch_costs must have a value for every patch, got a masked array",
        ),
        (iter([1, 2, 3, 4]), TypeError, NUMBERS + "<list_iterator"),
    ],
)
def test_costs_that_are_none(costs, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make(steps="balanced", patch_costs=costs)


def test_many_missing_costs_are_counted():
    ids = np.arange(20)
    with pytest.raises(ValueError, match=r"got none for 1, 2, 3, 4, 5 and 14 more$"):
        PatchBatchSampler(ids, 1, seed=0, steps="balanced", patch_costs={0: 1})


def test_a_long_list_of_none_is_not_printed_whole():
    with pytest.raises(TypeError) as caught:
        PatchBatchSampler(np.arange(1000), 1, steps="balanced", patch_costs=["x"] * 1000)
    assert len(str(caught.value)) < 400


def test_the_largest_and_smallest_costs_are_fine():
    top = float(np.nextafter(2.0**512, 0))
    huge = PatchBatchSampler(
        PatchGroups.from_counts([2**31 - 1] * 2),
        2**31 - 1,
        seed=0,
        steps="balanced",
        patch_costs=[top, 2.0**-1022],
    )
    assert huge.plan.evaluator.locate(0, np.arange(2)).group.tolist() in ([0, 1], [1, 0])
    assert huge.plan._tables.buckets.run_groups.tolist() == [1, 0]


@pytest.mark.parametrize("steps", ["free", "same_patch"])
def test_costs_where_nobody_needs_them(steps):
    with pytest.raises(
        ValueError, match=f"patch_costs must be None if steps='{steps}': only steps='balanced' and"
    ):
        make(steps=steps, patch_costs=COSTS)


@pytest.mark.parametrize("steps", ["same patch", "Balanced", None, True, 1, ("balanced",)])
def test_unknown_steps(steps):
    match = "steps must be one of 'free', 'balanced', 'same_patch', got "
    with pytest.raises(ValueError, match=match + re.escape(repr(steps))):
        make(steps=steps)


def test_balanced_steps_need_patches_that_are_interleaved():
    with pytest.raises(ValueError, match="interleave must be True under steps='balanced', got Fal"):
        make(steps="balanced", interleave=False)


@pytest.mark.parametrize(
    ("width", "error", "match"),
    [
        (0, ValueError, "step_width must be >= 1, got 0"),
        (-4, ValueError, "step_width must be >= 1, got -4"),
        (2**31, ValueError, "step_width must be < 2147483648, got 2147483648"),
        (True, TypeError, "step_width must be an int, got True"),
        (1.5, TypeError, "step_width must be an int, got 1.5"),
        (4.0, TypeError, "step_width must be an int, got 4.0"),
        ("4", TypeError, "step_width must be an int, got '4'"),
        ([4], TypeError, "step_width must be an int, got "),
    ],
)
@pytest.mark.parametrize("steps", ["free", "balanced", "same_patch"])
def test_widths_that_are_none(steps, width, error, match):
    with pytest.raises(error, match=re.escape(match)):
        make(steps=steps, step_width=width)
    groups = PatchGroups.from_ids(IDS)
    with pytest.raises(error, match=re.escape(match)):
        EpochPlan(groups, 4, 1, steps=steps, step_width=width)


def test_a_width_where_steps_are_free():
    match = "step_width must be 1 under steps='free', got 2: use steps='balanced' or 'same_patch'"
    with pytest.raises(ValueError, match=match):
        make(step_width=2)
    with pytest.raises(ValueError, match=match):
        make(step_width=2, num_replicas=2, rank=0)
    assert list(make(step_width=1)) == list(make())


@pytest.mark.parametrize("steps", ["balanced", "same_patch"])
def test_a_width_that_ranks_do_not_divide(steps):
    for width in (1, 3, 5):
        with pytest.raises(
            ValueError, match=f"step_width must be a multiple of num_replicas=2, .*, got {width}$"
        ):
            make(steps=steps, step_width=width, num_replicas=2, rank=0)
    assert make(steps=steps, step_width=np.int16(6), num_replicas=2, rank=0).plan.step_width == 6


def test_no_step_is_left():
    # The largest patch has 13 batches.
    settings = {"steps": "same_patch", "uneven": "drop"}
    match = (
        "step_width must be at most 13, got 14: no patch has more than 13 batches, and "
        "uneven='drop' would drop every step"
    )
    with pytest.raises(ValueError, match=match):
        make(**settings, step_width=14)
    with pytest.raises(ValueError, match=match):
        make(**settings, num_replicas=14, rank=0)
    assert quiet(IDS, 4, seed=1, **settings, step_width=13).plan.num_batches == 13


def test_patches_that_are_left_out_are_told_where_the_sampler_is_made():
    match = (
        r"^uneven='drop' under steps='same_patch' leaves out 2 of 4 patches \(10 samples\): each "
        r"has fewer batches than step_width=3\. Use uneven='pad' to include them\.$"
    )
    with pytest.warns(UserWarning, match=match) as caught:
        sampler = PatchBatchSampler(
            IDS,
            4,
            seed=1,
            steps="same_patch",
            step_width=3,
            uneven="drop",
        )
    assert [warning.filename for warning in caught] == [__file__]
    line = Path(__file__).read_text().splitlines()[caught[0].lineno - 1]
    assert line.strip() == "sampler = PatchBatchSampler("
    # 8 and 13 batches, the last of 2 samples: six and twelve of them are handed out.
    missed = sampler.coverage().missed.tolist()
    assert missed == [7, 30 - 24, 50 - 48, 3]


def test_both_warnings_are_given():
    # A patch of 3 is smaller than a batch, one of 7 has one batch and is smaller than a step.
    with pytest.warns(UserWarning, match="leaves out") as caught:
        make(partial="drop", steps="same_patch", step_width=2, uneven="drop")
    assert [str(warning.message).partition(" (")[0] for warning in caught] == [
        "partial='drop' leaves out 1 of 4 patches",
        "uneven='drop' under steps='same_patch' leaves out 1 of 4 patches",
    ]
