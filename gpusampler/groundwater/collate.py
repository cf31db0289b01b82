"""Collate samples of one patch: stack the values and keep one copy of the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CLOUD = ("core_coords", "ghost_coords")


def collate_fn(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack samples of one patch, and return one copy of their points.

    A neural operator with a graph encoder builds one graph per forward pass, so all samples
    of a batch must have the same points. `torch.utils.data.default_collate` would return B
    copies of the points and would not detect a second patch.

    Parameters
    ----------
    samples : sequence of dict
        Samples of `gpusampler.groundwater.GWPatchDataset`, at least one.

    Returns
    -------
    dict
        ``patch_id`` is an int, ``core_coords`` has shape [1, Nc, 3] and ``ghost_coords``
        [1, Ng, 3]. Other tensors are stacked along a new first axis (``core_in`` becomes
        [B, Tin, Nc, C]), other values are collected in a list. Dtype and device are those of
        the samples.

    Raises
    ------
    ValueError
        If there are no samples, the samples come from several patches, or a transform gave
        samples of one patch different points.

    Examples
    --------
    >>> from gpusampler.demo.embedded import small_data
    >>> from gpusampler.groundwater import GWPatchDataset
    >>> dataset = GWPatchDataset(small_data(), 6, 1)
    >>> batch = collate_fn([dataset[0], dataset[1]])
    >>> batch["core_in"].shape[:2], batch["core_coords"].shape[0]
    (torch.Size([2, 6]), 1)
    """
    import torch

    if not samples:
        raise ValueError("samples must hold at least one sample, got 0")
    first = samples[0]
    ids = sorted({int(sample["patch_id"]) for sample in samples})
    if len(ids) > 1:
        raise ValueError(
            f"a batch must hold samples of one patch, got patches {', '.join(map(str, ids))}; "
            "use batch_sampler=PatchBatchSampler(dataset, batch_size)"
        )
    batch: dict[str, Any] = {}
    for key, value in first.items():
        if key == "patch_id":
            batch[key] = ids[0]
        elif key in _CLOUD:
            for sample in samples[1:]:
                if not torch.equal(sample[key], value):
                    raise ValueError(
                        f"{key} must be the same in every sample of patch {ids[0]}; "
                        "the transform returned different points for two of its samples"
                    )
            batch[key] = value.unsqueeze(0)
        elif isinstance(value, torch.Tensor):
            batch[key] = torch.stack([sample[key] for sample in samples])
        else:
            batch[key] = [sample[key] for sample in samples]
    return batch
