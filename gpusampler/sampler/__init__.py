"""What a training loop holds: samplers, loaders, cursors, their state and their ranks."""

from gpusampler.sampler.batch_sampler import PatchBatchSampler
from gpusampler.sampler.batches import Batch
from gpusampler.sampler.tensor_loader import PatchTensorLoader

__all__ = ["Batch", "PatchBatchSampler", "PatchTensorLoader"]
