"""Training of layer-parallel networks: data, the training loop, checkpoints, full-batch optimisation."""
