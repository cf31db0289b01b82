"""All peers, in the order of the tables."""

from __future__ import annotations

from benchmarks.peers.ours import OURS
from benchmarks.peers.peer import Peer
from benchmarks.peers.samplers.mosaic import MOSAIC
from benchmarks.peers.samplers.packages import PACKAGES
from benchmarks.peers.samplers.restated import PLAIN, RESTATED

PEERS: tuple[Peer, ...] = (*OURS, *PLAIN, *PACKAGES, MOSAIC, *RESTATED)
