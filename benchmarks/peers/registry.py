"""All peers, in the order of the tables."""

from __future__ import annotations

from benchmarks.peers.ours import OURS, PLAIN
from benchmarks.peers.packages import PACKAGES
from benchmarks.peers.peer import Peer
from benchmarks.peers.restated.designs import RESTATED
from benchmarks.peers.restated.mosaic import MOSAIC

PEERS: tuple[Peer, ...] = (*OURS, *PLAIN, *PACKAGES, MOSAIC, *RESTATED)
