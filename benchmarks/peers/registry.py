"""All peers, in the order of the tables."""

from __future__ import annotations

from benchmarks.peers.mosaic import MOSAIC
from benchmarks.peers.ours import OURS, PLAIN
from benchmarks.peers.packages import PACKAGES
from benchmarks.peers.peer import Peer
from benchmarks.peers.restated import RESTATED

PEERS: tuple[Peer, ...] = (*OURS, *PLAIN, *PACKAGES, MOSAIC, *RESTATED)
