"""calibrate: derive a cost budget from the measured memory of a training step."""
