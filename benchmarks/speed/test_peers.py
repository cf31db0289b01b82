"""Peers beside ours, one by one: making a sampler, and an epoch of it, on the same ids."""

from __future__ import annotations

from collections import deque

import pytest

from benchmarks.peers.cases import Case
from benchmarks.peers.measure import begin
from benchmarks.peers.peer import missing
from benchmarks.peers.registry import PEERS
from gpusampler.permutation import _native

CASE = Case(20_000, 50, 32)
ROUNDS = 3


@pytest.fixture(params=PEERS, ids=lambda peer: peer.name)
def peer(request, monkeypatch):
    # One of ours has NumPy evaluate, in the process that makes it.
    monkeypatch.setattr(_native, "module", _native.module)
    if why := missing(request.param):
        pytest.skip(why)
    return request.param


def test_peer_is_made(benchmark, peer):
    benchmark.group = f"construct: {CASE}"
    work = peer.prepare(CASE.ids(), CASE.batch_size)
    benchmark.pedantic(peer.make, args=(work, 0), rounds=ROUNDS, warmup_rounds=1)


def test_peer_epoch(benchmark, peer):
    benchmark.group = f"epoch: {CASE}"
    work = peer.prepare(CASE.ids(), CASE.batch_size)
    sampler = peer.make(work, 0)
    begin(sampler, 0)
    benchmark.pedantic(deque, args=(sampler, 0), rounds=ROUNDS, warmup_rounds=1)
