"""Samplers, loaders and cursors of a training loop, with their saved state and ranks."""

from gpusampler.sampler.batch_sampler import PatchBatchSampler
from gpusampler.sampler.batches import Batch
from gpusampler.sampler.tensor_loader import PatchTensorLoader

__all__ = ["Batch", "PatchBatchSampler", "PatchTensorLoader"]
