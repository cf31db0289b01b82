"""Fingerprints: what determines a plan's batches besides the seed, and how two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from gpusampler.core.text import short_repr
from gpusampler.permutation.reference import VERSION
from gpusampler.plan.epoch_plan import EpochPlan

SAMPLES = frozenset({"ids", "num_samples", "num_patches", "permutation"})
"""Members of a fingerprint that are not settings."""
HASHES = frozenset({"ids", "batch_sizes", "weights", "patch_costs"})
"""Members of a fingerprint that are hashes of values."""


def fingerprint_of(plan: EpochPlan) -> dict[str, Any]:
    """Return what determines a plan's batches besides the seed, as JSON-safe values by name."""
    return {
        "ids": plan.groups.fingerprint,
        "num_samples": plan.groups.num_samples,
        "num_patches": plan.groups.num_patches,
        "permutation": VERSION,
        **plan.settings,
    }


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], places: tuple[str, str]
) -> dict[str, str]:
    """Return a description of each difference between two fingerprints, by the member's name.

    ``places`` says where each fingerprint is from, such as "in the checkpoint".
    """

    def describe(fingerprint: Mapping[str, Any], name: str) -> str:
        return short_repr(fingerprint[name]) if name in fingerprint else "absent"

    def differs(name: str) -> bool:
        if name not in first or name not in second:
            return True
        # Types must agree, too: 1 is neither True nor 1.0. Values of different types are not
        # compared.
        return type(first[name]) is not type(second[name]) or bool(first[name] != second[name])

    return {
        name: f"{'hash of ' * (name in HASHES)}{name} is {describe(first, name)} {places[0]}, "
        f"{describe(second, name)} {places[1]}"
        for name in {**second, **first}
        if differs(name)
    }


def check_fingerprint(
    saved: Any, current: Mapping[str, Any], advice: Callable[[Set[str]], str] = lambda _: ""
) -> None:
    """Raise, naming the differences, if a saved fingerprint differs from the current one.

    ``advice`` returns the end of the message, given the names of the members that differ.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"state_dict fingerprint must be a mapping, got {type(saved).__name__}")
    differing = differences(saved, current, ("in the checkpoint", "in this sampler"))
    if differing:
        raise ValueError(
            f"Cannot load state: {'; '.join(differing.values())}. Build the sampler with the same "
            f"ids and settings.{advice(differing.keys())}"
        )
