"""Memory that there is, that is about to be taken, and that was: host and device."""

from __future__ import annotations

from gpusampler.arrays import Device


def check_room(needed: int, device: Device, what: str, instead: str) -> None:
    """Warn if what is about to be allocated takes more than half of the memory that is free.

    Parameters
    ----------
    needed : int
        Bytes.
    device : Device
        The host's memory or a GPU's.
    what : str
        What is made, for the text.
    instead : str
        What to do, for the text.
    """
