"""Training of layer-parallel networks: checkpoints, full-batch optimisation."""
