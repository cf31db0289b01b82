"""State: what may differ where it is loaded, and what is refused by name."""

from __future__ import annotations

import contextlib
import functools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler, PatchGroups
from support.strategies import (
    IDS,
    draw,
    epoch_of,
    make,
    mid_epoch_state,
)


def test_a_drawn_seed_gives_way_and_a_given_one_does_not():
    state = make(seed=5).state_dict()
    drawn = PatchBatchSampler(IDS, 4)
    drawn.load_state_dict(state)
    assert drawn.seed == 5
    assert list(drawn) == epoch_of(make(seed=5), 0)
    # It was not given here, so another state may replace it again.
    drawn.load_state_dict(make(seed=6).state_dict())
    assert drawn.seed == 6
    given_one = make(seed=4)
    with pytest.raises(ValueError, match="Saved state uses seed 5, this sampler seed 4"):
        given_one.load_state_dict(state)
    assert given_one.seed == 4
    assert list(given_one) == epoch_of(make(seed=4), 0)


def test_a_seed_of_zero_is_a_given_seed():
    with pytest.raises(ValueError, match="uses seed 5, this sampler seed 0"):
        make(seed=0).load_state_dict(make(seed=5).state_dict())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"batch_size": 5}, "batch_size is 4 in the checkpoint, 5 in this sampler"),
        ({"partial": "pad"}, "partial is 'keep' in the checkpoint, 'pad' in this sampler"),
        ({"interleave": False}, "interleave is True in the checkpoint, False in this sampler"),
        (
            {"shuffle_patches": False},
            "shuffle_patches is True in the checkpoint, False in this sampler",
        ),
        (
            {"shuffle_within_batches": False},
            "shuffle_within_batches is True in the checkpoint, False in this sampler",
        ),
        ({"batch_size": 5, "partial": "pad"}, "batch_size is .*; partial is "),
    ],
)
def test_other_settings_are_refused_by_name(settings, names):
    sampler = make(**settings)
    with pytest.raises(ValueError, match=f"Cannot load state: .*{names}"):
        sampler.load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match=names):
        iter(sampler).load_state_dict(make().state_dict())
    assert list(sampler) == epoch_of(sampler, 0)


def test_other_ids_are_refused_by_name():
    state = make().state_dict()
    swapped = IDS.copy()
    first, second = 0, int(np.flatnonzero(IDS[0] != IDS)[0])
    swapped[[first, second]] = IDS[[second, first]]
    for ids, names in [
        (swapped, "ids is "),
        (np.append(IDS, 5), "num_samples is 90 in the checkpoint, 91 in this sampler"),
        (np.where(IDS == 40, 9, IDS), "num_patches is 4 in the checkpoint, 3 in this sampler"),
    ]:
        with pytest.raises(ValueError, match=names):
            PatchBatchSampler(ids, 4).load_state_dict(state)


def test_what_does_not_change_batches_may_differ(library):
    sampler = PatchBatchSampler(
        library.array(IDS.astype(np.int8)),
        4,
        seed=1,
        output="numpy",
        num_replicas=2,
        rank=1,
        uneven="drop",
        progress=False,
        device=library.device,
    )
    sampler.load_state_dict(mid_epoch_state(3, 5))
    expected = epoch_of(make(), 3)[5:]
    # Nineteen slots are left: rank 1 of 2 has the second of each pair.
    assert [batch.tolist() for batch in sampler] == expected[1::2]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"version": 2}, ValueError, "must have format version 1, got 2"),
        ({"epoch": -1}, ValueError, "state_dict epoch must be >= 0"),
        ({"epoch": 1.5}, TypeError, "state_dict epoch must be an int"),
        ({"slot": 25}, ValueError, "state_dict slot must be < 25, got 25"),
        ({"slot": -1}, ValueError, "state_dict slot must be >= 0"),
        ({"seed": "5"}, TypeError, "state_dict seed must be an int, got '5'"),
        ({"version": True}, TypeError, "state_dict version must be an int, got True"),
        ({"version": 1.0}, TypeError, r"state_dict version must be an int, got 1\.0"),
        ({"step_width": 0}, ValueError, "state_dict step_width must be >= 1, got 0"),
        (
            {"step_width": 3},
            ValueError,
            "state_dict step_width must be 1 under steps='free', got 3",
        ),
        ({"fingerprint": 12}, TypeError, "fingerprint must be a mapping, got int"),
        ({"fingerprint": {}}, ValueError, "ids is absent in the checkpoint, "),
    ],
)
def test_broken_states(change, error, match):
    sampler = PatchBatchSampler(IDS, 4)
    seed = sampler.seed
    state = {**mid_epoch_state(3), **change}
    with pytest.raises(error, match=match):
        sampler.load_state_dict(state)
    # A state that is refused leaves everything as it was.
    assert (sampler.seed, sampler.epoch) == (seed, 0)
    assert sampler.state_dict()["slot"] == 0


@pytest.mark.parametrize(
    "lacking", ["version", "epoch", "slot", "seed", "step_width", "fingerprint"]
)
def test_states_that_lack_something(lacking):
    state = mid_epoch_state()
    del state[lacking]
    with pytest.raises(TypeError, match=f"it lacks \\['{lacking}'\\]"):
        make().load_state_dict(state)


@pytest.mark.parametrize("state", [None, 5, [1, 2], "state"])
def test_states_that_are_no_mapping(state):
    with pytest.raises(TypeError, match="state_dict must be a mapping, got"):
        make().load_state_dict(state)


def test_loading_forgets_the_pass_in_progress():
    sampler = make()
    iterator = iter(sampler)
    draw(iterator, 9)
    sampler.load_state_dict(mid_epoch_state(3, 5))
    assert sampler.state_dict() == mid_epoch_state(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(sampler) == epoch_of(sampler, 3)[5:]


# Everything below is thrown at a sampler in the middle of a pass. What it refuses, it refuses by
# name and without a trace; what it takes, it goes on from.

SLOTS = 24
STATE = mid_epoch_state()
GROUPS = PatchGroups.from_ids(IDS)


def fresh(seed: int | None) -> PatchBatchSampler:
    """What `make` gives, sooner."""
    return PatchBatchSampler(GROUPS, 4, seed=seed)


@functools.cache
def whole(seed: int, epoch: int) -> list[list[int]]:
    return epoch_of(fresh(seed), epoch)


def settled(given: bool, through: str):
    """A sampler that has drawn five batches, what loads a state into it, and its iterator."""
    sampler = fresh(1 if given else None)
    sampler.load_state_dict({**STATE, "epoch": 2, "slot": 0})
    begun = iter(sampler)
    draw(begun, 5)
    if through == "another iterator":
        return sampler, iter(sampler), begun
    return sampler, sampler if through == "sampler" else begun, begun


def refusal(loads, state) -> str | None:
    """How a state is refused, None if it is not; every other exception is a defect."""
    try:
        loads.load_state_dict(state)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def really_valid(state, given: bool) -> bool:
    """Whether a state is one, said without the package: equal to what is saved, and in range."""
    if not isinstance(state, dict) or not set(STATE) <= set(state):
        return False
    b = state["fingerprint"]
    if not isinstance(b, dict):
        return False
    a = STATE["fingerprint"]
    limits = {"version": 2, "epoch": 1 << 63, "slot": SLOTS + 1, "step_width": 2}
    limits["seed"] = 2 if given else 1 << 64
    least = {"version": 1, "step_width": 1, "seed": int(given)}
    return (
        set(b) == set(a)
        and all(type(b[name]) is type(a[name]) for name in a)
        and b == a
        and all(type(state[name]) is int for name in limits)
        and all(least.get(name, 0) <= state[name] < top for name, top in limits.items())
    )


def throw(state, names, *, given: bool = True, through: str = "sampler") -> bool:
    """Load a state; return whether it was refused, by one of these names and without a trace."""
    sampler, loads, begun = settled(given, through)
    before = sampler.state_dict(), begun.state_dict(), sampler.epoch, sampler.seed, sampler.plan
    kept = repr(state)
    valid = really_valid(state, given)
    message = refusal(loads, state)
    assert repr(state) == kept
    if message is not None:
        assert not valid, f"a good state was refused: {message}"
        assert any(name in message for name in names), f"{names} not in {message!r}"
        assert len(message) < 2000
        after = sampler.state_dict(), begun.state_dict(), sampler.epoch, sampler.seed, sampler.plan
        assert after == before
        assert list(begun) == whole(1, 2)[5:]
        assert list(sampler) == whole(1, 3)
        return True
    assert valid, f"a bad state was taken: {state}"
    remaining = whole(state["seed"], state["epoch"])[state["slot"] :]
    if through == "sampler" and not remaining:
        # A finished epoch leads to the next one.
        remaining = whole(state["seed"], state["epoch"] + 1)
    assert list(sampler if through == "sampler" else loads) == remaining
    assert sampler.seed == state["seed"]
    return False


JUNK = [
    None,
    "",
    "1",
    "keep",
    True,
    False,
    -1,
    0,
    1,
    25,
    2**31,
    2**63 - 2,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63) - 1,
    10**30,
    1.0,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e300,
    [],
    [1],
    {},
    {"ids": 1},
    b"1",
    (1, 2),
    object,
]
THROUGH = ["sampler", "begun iterator", "another iterator"]
KEYS = [(name,) for name in STATE]
KEYS += [("fingerprint", name) for name in STATE["fingerprint"]]
# Words that only an error about this key has: "conversion" is not "version".
NAMES = {path: f"{path[-1]} is " for path in KEYS} | {
    ("version",): " version ",
    ("step_width",): "state_dict step_width",
    ("epoch",): "state_dict epoch",
    ("slot",): "state_dict slot",
    ("seed",): "seed ",
    ("fingerprint",): "fingerprint must",
}


def changed(state, path, value):
    if len(path) == 1:
        return {**state, path[0]: value}
    return {**state, path[0]: {**state[path[0]], path[1]: value}}


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize(
    ("path", "given"),
    [*((path, True) for path in KEYS), (("seed",), False)],
    ids=[*map(".".join, KEYS), "drawn seed"],
)
def test_any_value_in_any_place_is_refused_by_name_or_meant(path, given, through):
    refused = 0
    for value in JUNK:
        # A mapping is a fingerprint of other ids and settings, all of which are named.
        names = [NAMES[path]] if not isinstance(value, dict) else [NAMES[path], "ids is "]
        refused += throw(changed(STATE, path, value), names, given=given, through=through)
    assert refused >= len(JUNK) - 8


@pytest.mark.parametrize("through", THROUGH)
def test_missing_keys_are_refused_by_name_in_any_number(through):
    names = list(mid_epoch_state())
    for dropped in range(1, 1 << len(names)):
        missing = [name for number, name in enumerate(names) if dropped >> number & 1]
        state = {name: value for name, value in STATE.items() if name not in missing}
        assert throw(state, [str(sorted(missing))], through=through)
    for name in STATE["fingerprint"]:
        state = mid_epoch_state()
        del state["fingerprint"][name]
        assert throw(state, [f"{name} is absent in the checkpoint"], through=through)


@pytest.mark.parametrize("through", THROUGH)
def test_keys_that_nobody_knows(through):
    # Beside the others they say nothing; among the settings they may change batches.
    for value in JUNK:
        assert not throw({**STATE, "more": value, 5: value}, [], through=through)
        state = changed(STATE, ("fingerprint", "more"), value)
        assert throw(state, ["more is "], through=through)


@pytest.mark.parametrize("through", THROUGH)
def test_text_that_breaks_off_is_no_state(through):
    written = json.dumps(STATE)
    for end in range(len(written)):
        with pytest.raises(json.JSONDecodeError):
            json.loads(written[:end])
    assert throw(written[:100], ["state_dict must be a mapping, got str"], through=through)
    # What a reader makes of it that closes what is open.
    broken = {}
    for end in range(1, len(written)):
        for closing in ("}", "}}", '"}}', "null}}", "0}", "null}"):
            text = written[:end].rstrip(", ") + closing
            with contextlib.suppress(json.JSONDecodeError):
                broken[json.dumps(json.loads(text))] = text
    del broken[written]
    assert len(broken) > 50
    for text in broken:
        throw(json.loads(text), [*NAMES.values(), "it lacks"], through=through)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 30)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(max_examples=60)
@given(
    changes=st.lists(st.tuples(st.sampled_from(KEYS), anything), min_size=1, max_size=3),
    through=st.sampled_from(THROUGH),
    seed_given=st.booleans(),
)
def test_several_places_changed_at_once(changes, through, seed_given):
    state = mid_epoch_state()
    for path, value in changes:
        if path[0] == "fingerprint" and not isinstance(state["fingerprint"], dict):
            continue
        state = changed(state, path, value)
    throw(state, NAMES.values(), given=seed_given, through=through)


@given(
    epoch=st.integers(0, 2**63 - 2),
    slot=st.integers(0, SLOTS),
    seed=st.integers(0, 2**64 - 1),
    through=st.sampled_from(THROUGH),
)
def test_every_place_of_every_epoch_is_a_state(epoch, slot, seed, through):
    state = {**STATE, "epoch": epoch, "slot": slot, "seed": seed}
    assert not throw(state, [], given=False, through=through)


@pytest.mark.parametrize("through", THROUGH)
def test_another_datasets_state_changes_nothing(through):
    for ids in (IDS[::-1], np.roll(IDS, 1), IDS + 1, IDS[:-1]):
        other = PatchBatchSampler(ids, 4, seed=1)
        draw(iter(other), 5)
        assert throw(other.state_dict(), ["ids is ", "num_samples is "], through=through)


@pytest.mark.parametrize("value", [10**5000, np.array([1, 2])], ids=["too long", "an array"])
@pytest.mark.parametrize("path", [("version",), ("slot",), ("fingerprint", "ids")], ids=".".join)
def test_values_that_neither_print_nor_compare_are_refused_by_name(path, value):
    if path == ("slot",) and isinstance(value, np.ndarray):
        value = -(10**5000)
    message = refusal(fresh(1), changed(STATE, path, value))
    assert message is not None
    assert NAMES[path] in message


def test_a_warning_that_is_an_error_changes_nothing():
    kind = {"steps": "same_patch", "step_width": 4}
    state = PatchBatchSampler(IDS, 4, seed=5, **kind).state_dict()
    sampler = PatchBatchSampler(IDS, 4, seed=1, num_replicas=3, rank=0, steps="same_patch")
    sampler._tracker.seed_given = False  # as if the ranks of a process group had drawn it
    seed, before = sampler.seed, sampler.state_dict()
    # (Warnings are errors in these tests.)
    with pytest.raises(UserWarning, match="may process different patches"):
        sampler.load_state_dict(state)
    assert (sampler.seed, sampler.state_dict()) == (seed, before)

    loaded = make()
    loaded.load_state_dict(mid_epoch_state())
    position = loaded.state_dict()
    with pytest.raises(UserWarning, match="drops the loaded position"):
        loaded.set_epoch(position["epoch"] + 1)
    assert loaded.state_dict() == position
