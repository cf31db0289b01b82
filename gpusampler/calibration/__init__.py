"""calibrate: a budget of cost from what a training step takes of the memory."""
