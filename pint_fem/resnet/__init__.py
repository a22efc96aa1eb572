"""Layer-parallel training of deep residual networks: layers are time steps. Needs torch and mpi4py."""

try:
    import torch  # noqa: F401
except ImportError as error:
    from pint_fem.requirements import missing

    raise (missing(error, "pint_fem.resnet") or error) from error

from pint_fem.resnet.activation_kinds import Activation
from pint_fem.resnet.activations import activation
from pint_fem.resnet.blocks.network import LayerParallel
from pint_fem.resnet.blocks.own_layers import Repeat
from pint_fem.resnet.blocks.serial import SerialLayers
from pint_fem.resnet.grid import Grid
from pint_fem.resnet.iterations import Adaptive, Iterations
from pint_fem.resnet.layers import Convolution, Dense, Layer
from pint_fem.resnet.multilevel import refine
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.regularisation import Regularisation
from pint_fem.resnet.serial import SerialResNet
from pint_fem.resnet.training.checkpoint import load_checkpoint, reserve_checkpoint, save_checkpoint
from pint_fem.resnet.training.full_batch import TrainingProblem

__all__ = [
    "Activation",
    "Adaptive",
    "Convolution",
    "Dense",
    "Grid",
    "Iterations",
    "Layer",
    "LayerParallel",
    "LayerParallelResNet",
    "Regularisation",
    "Repeat",
    "SerialLayers",
    "SerialResNet",
    "TrainingProblem",
    "activation",
    "load_checkpoint",
    "refine",
    "reserve_checkpoint",
    "save_checkpoint",
]
