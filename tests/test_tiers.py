"""The tiers of tests: a mark needs its reason, and what makes the default tier slow is named."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from support import plugin
from support.paths import ROOT


def item_with(*marks: pytest.MarkDecorator) -> SimpleNamespace:
    return SimpleNamespace(nodeid="a test", iter_markers=lambda: [one.mark for one in marks])


@pytest.mark.parametrize("tier", plugin.TIERS)
def test_a_mark_without_a_reason_is_refused(tier):
    mark = getattr(pytest.mark, tier)
    plugin.check_tiers(item_with(mark("because"), pytest.mark.gpu))
    for bare in (mark, mark(), mark(""), mark(3)):
        with pytest.raises(pytest.fail.Exception, match=f"{tier} needs a reason"):
            plugin.check_tiers(item_with(bare))


def test_a_test_in_two_tiers_is_refused():
    twice = item_with(pytest.mark.slow("why"), pytest.mark.serial("why"))
    with pytest.raises(pytest.fail.Exception, match=r"one tier, got \['serial', 'slow'\]"):
        plugin.check_tiers(twice)


@pytest.mark.parametrize(
    ("expression", "alone"),
    [
        ("", True),
        ("serial", True),
        ("slow or serial", True),
        ("gpu and not slow", True),
        ("not slow and not battery and not serial", False),
        ("slow or mf6", False),
    ],
)
def test_tests_that_measure_or_share_a_gpu_have_one_process(monkeypatch, expression, alone):
    config = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
    monkeypatch.setattr(plugin, "has_torch_cuda", lambda: False)
    monkeypatch.setattr(plugin, "has_cupy_cuda", lambda: False)
    monkeypatch.setattr(plugin.os, "cpu_count", lambda: 200)
    assert plugin.pytest_xdist_auto_num_workers(config) == (0 if alone else 8)
    monkeypatch.setattr(plugin, "has_torch_cuda", lambda: True)
    assert plugin.pytest_xdist_auto_num_workers(config) == 0


def report_of(test: str, took: float, quick: bool = True) -> SimpleNamespace:
    return SimpleNamespace(nodeid=test, duration=took, should_be_quick=quick)


def test_what_takes_too_long_is_named_with_its_setup():
    limit = plugin.MAX_SECONDS
    reports = [
        report_of("setup and call", limit / 2),
        report_of("setup and call", limit / 2 + 1),
        report_of("quick", limit - 1),
        report_of("marked", limit + 5, quick=False),
        report_of("call", limit + 2),
        SimpleNamespace(nodeid="deselected"),
    ]
    assert plugin.slow_unmarked(reports) == [("call", limit + 2), ("setup and call", limit + 1)]


def test_ci_runs_the_readmes_command_and_every_tier_but_the_battery():
    script = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^(.*\S) +# the tests", (ROOT / "README.md").read_text(), re.M)
    assert f"bash -c '{command}'" in script
    assert re.findall(r"^pytest -m (.*)$", script, re.M) == ['"slow or mf6"', "serial"]
