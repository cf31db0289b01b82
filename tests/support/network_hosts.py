"""Two hosts on one machine: network namespaces that are joined by a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CABLE = "cable"
"""Network interface of both hosts."""
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Hosts:
    """Two namespaces, each with a loopback and one end of a veth pair. Needs root and ``ip``."""

    def __init__(self) -> None:
        self.names = [f"gpusampler-{os.getpid()}-{host}" for host in (0, 1)]

    def launcher(self, host: int) -> list[str]:
        """A command that runs another one on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def connect(self) -> None:
        first, second = self.names
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", CABLE, "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", CABLE, "up")

    def cut(self) -> None:
        """Take the second host's end down: the first loses the carrier, and no packet arrives."""
        ip("-n", self.names[1], "link", "set", CABLE, "down")

    def mend(self) -> None:
        """Undo `cut`."""
        ip("-n", self.names[1], "link", "set", CABLE, "up")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts, or skip the test where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces: iproute2 is not installed")
    hosts, made = Hosts(), []
    try:
        try:
            for name in hosts.names:
                ip("netns", "add", name)
                made.append(name)
            hosts.connect()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces: {error.stderr.strip()}")
        yield hosts
    finally:
        for name in made:
            ip("netns", "delete", name)
