r"""
A network of your own block
===========================

A residual network :math:`u_{n+1} = u_n + h f_n(u_n)` is an evolution: its layers are time steps. So its layers can be
computed all at once, forward and backward, by the solver that this package has for time steps, on as many processes as
there are. This tutorial trains such a network of a block of *your own*, in an ordinary torch loop, shows what is the
same as in serial torch and what is not, and tells when it pays.

.. code-block:: bash

   python docs/tutorials/08_network.py
   mpiexec -n 2 python docs/tutorials/08_network.py

torch and mpi4py are required, Firedrake is not. It takes an hour to read and to try, and some seconds to run.
"""

# %%
# 1. Ten lines
# ------------
#
# Your block is any ``torch.nn.Module`` whose output has the shape of its input. ``LayerParallel`` makes a network of a
# list of them, with an opening module in front and a closing one behind. It is a ``torch.nn.Module`` itself.
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from pint_fem.resnet import LayerParallel, load_checkpoint, save_checkpoint

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"  # told apart by colour-blind readers, too
comm = MPI.COMM_WORLD
torch.set_num_threads(1)  # one thread per rank


# %%
class Block(nn.Module):
    """The block of this tutorial; write yours."""

    def __init__(self, width=8):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, u):
        return self.outer(torch.tanh(self.inner(u)))


# %%
# On several ranks each has a part of the layers: with two ranks the first half and the second. Seeds work as in serial
# torch: all ranks make all blocks with the same seed here, and each keeps its own. (For networks that are too large for
# that, ``Repeat(make, count)`` makes a rank's own blocks only.)
LAYERS, M = 64, 8


def network(**options):
    torch.manual_seed(1)
    return LayerParallel(
        [Block() for _ in range(LAYERS)], opening=nn.Linear(2, 8), closing=nn.Linear(8, 2), h=4 / LAYERS,
        mgrit={"levels": 2, "coarsening": M, "relax": "F"}, batched=False, **options,
    )  # fmt: skip


# %%
# The task: tell the points of two crescents apart, which no straight line does. 300 points for training and 100 for the
# test, all in one batch. *All ranks get the same batch*, and all get the same output.
generator = torch.Generator().manual_seed(0)
labels = torch.arange(400) % 2
angle = torch.pi * torch.rand(400, generator=generator)
crescent = torch.stack([torch.cos(angle) - 0.5, torch.sin(angle) - 0.25], 1)
points = crescent * (1 - 2 * labels)[:, None] / 1.5 + 0.05 * torch.randn(400, 2, generator=generator)
train, test = slice(0, 300), slice(300, 400)

# %%
# 2. What is the same as in serial torch
# --------------------------------------
#
# Without further options sweeps are solved until they are exact (to 1e-6 in float32), and everything is as in torch.
# ``net.serial_copy()`` is the same network in plain torch, with the same parameters: compare.
net = network()
serial = net.serial_copy()
loss = nn.functional.cross_entropy(net(points[train]), labels[train])
loss.backward()
serial_loss = nn.functional.cross_entropy(serial(points[train]), labels[train])
serial_loss.backward()


def difference(net, serial):
    """Relative difference of the gradients of the own layers, the largest over the ranks."""
    pairs = [
        (p.grad, q.grad)
        for n, layer in enumerate(net.layers)
        for p, q in zip(layer.parameters(), serial.layers[n].parameters(), strict=False)
    ]
    error, size = (sum(float((f(p, q) ** 2).sum()) for p, q in pairs) for f in (lambda p, q: p - q, lambda p, q: q))
    return (comm.allreduce(error) / comm.allreduce(size)) ** 0.5


exact = difference(net, serial)
if comm.rank == 0:
    print(f"loss {loss:.6f}, in serial torch {serial_loss:.6f}; gradients differ by {exact:.0e}")
assert abs(loss - serial_loss) < 1e-5
assert exact < 1e-4

# %%
# So what you know of torch stays: optimisers that work entry by entry (SGD, Adam, AdamW), learning rates by group,
# freezing, ``train()`` and ``eval()``, dropout, normalisation, autocast. What differs follows from the layers being on
# different ranks:
#
# * ``net.parameters()`` are those of *this rank's* layers. A sum over all parameters is not what one rank sees:
#   ``net.clip_grad_norm_`` in place of torch's function, ``net.gradient_norm()``, ``net.parameter_count()``.
# * Optimisers that need sums over all parameters (``LBFGS``) are refused on several ranks.
# * All ranks have to do the same: the same batches in the same order, no ``if`` that only one rank takes around a call
#   of the network. A difference is an error that names it, not a run that hangs.
if comm.rank == 0:
    print(net)
assert net.parameter_count() == 2 * 8 + 8 + 8 * 2 + 2 + LAYERS * (8 * 16 + 16 + 16 * 8 + 8)

# %%
# 3. Inexact sweeps, and how inexact they are
# -------------------------------------------
#
# A training step needs no exact gradient: a batch is a sample anyway. ``forward_iterations=1, backward_iterations=1``
# takes one cycle each way. A coarse layer stands for M = 8 layers and has the *mean* of their parameters. How large is
# the error of the gradient?
errors = {}
for cycles in ((1, 1), (2, 1), (2, 2), (3, 3)):
    inexact = network(forward_iterations=cycles[0], backward_iterations=cycles[1])
    nn.functional.cross_entropy(inexact(points[train]), labels[train]).backward()
    errors[cycles] = difference(inexact, serial)
    if comm.rank == 0:
        print(f"{cycles[0]} cycles forward, {cycles[1]} backward: error of the gradient {errors[cycles]:.0e}")
assert errors[1, 1] < 0.05
assert errors[3, 3] < errors[2, 2] < errors[1, 1]


# %%
# **What to expect.** The error falls quickly with the number of cycles. **What could go wrong.** It is larger for
# fewer, longer steps (``h``), larger M, and blocks with normalisation or several products. Measure it as here for
# *your* block before a long training, and again with trained parameters; or let ``adaptive=Adaptive(every=50)`` do so
# during the training and add cycles where necessary.
#
# 4. The training loop
# --------------------
#
# Nothing in it is special.
def epoch(net, optimizer):
    """One step with all points; return the loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(points[train]), labels[train])
    loss.backward()
    optimizer.step()
    return loss.item()


EPOCHS = 40
net = network(forward_iterations=1, backward_iterations=1)
serial = net.serial_copy()
optimizer, other = torch.optim.Adam(net.parameters(), lr=1e-2), torch.optim.Adam(serial.parameters(), lr=1e-2)
losses, serial_losses = [], []
for _ in range(EPOCHS // 2):
    losses.append(epoch(net, optimizer))
    serial_losses.append(epoch(serial, other))

# %%
# 5. A checkpoint in the middle
# -----------------------------
#
# Every rank writes its layers; a run on *another* number of ranks can continue. The folder has to be on a file system
# that all ranks see. Make a new network, as a program that starts again would, and continue.
folder = comm.bcast(tempfile.mkdtemp())
save_checkpoint(folder, net, optimizer, {"epoch": len(losses)})
net = network(forward_iterations=1, backward_iterations=1)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
progress = load_checkpoint(folder, net, optimizer)
assert progress["epoch"] == EPOCHS // 2
for _ in range(EPOCHS // 2):
    losses.append(epoch(net, optimizer))
    serial_losses.append(epoch(serial, other))

# %%
# 6. Evaluation
# -------------
#
# Under ``torch.no_grad()`` the layers are computed one after another, exactly, each on its rank (``evaluation="same"``
# would use the cycles of the training). ``net.full_state_dict()`` has the parameters of all ranks: load them into the
# serial copy, and you have a plain torch model for a machine without MPI.
net.eval()
with torch.no_grad():
    accuracy = float((net(points[test]).argmax(1) == labels[test]).float().mean())
plain = net.serial_copy().eval()
with torch.no_grad():
    accuracy_of_copy = float((plain(points[test]).argmax(1) == labels[test]).float().mean())
    serial_accuracy = float((serial(points[test]).argmax(1) == labels[test]).float().mean())
if comm.rank == 0:
    print(
        f"accuracy of the test points: {accuracy:.0%}, "
        f"as plain torch model {accuracy_of_copy:.0%}, trained serially {serial_accuracy:.0%}"
    )
assert accuracy == accuracy_of_copy
assert accuracy > 0.9

# %%
# **What could go wrong.** A network that was trained with inexact sweeps is evaluated exactly. If the loss of the
# training falls and the accuracy of the evaluation does not, the sweeps of the training were too inexact for the
# parameters that they led to, as happens with larger points or a larger ``h``. Compare with ``evaluation="same"``,
# measure the error of the gradient again as in section 3, and take more cycles, a smaller M or a smaller ``h``.
#
# The losses of the two trainings, with gradients of one cycle each way and exact ones, and the regions that the network
# has learned in this short training. The background is a contour of its output over the plane.
axis = torch.linspace(-1.1, 1.1, 80)
plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
with torch.no_grad():
    regions = torch.softmax(net(plane), 1)[:, 1].reshape(80, 80)
if comm.rank == 0:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    left.semilogy(losses, color=BLUE, label="layer-parallel, 1 + 1 cycles")
    left.semilogy(serial_losses, "--", color=ORANGE, label="serial torch")
    left.axvline(EPOCHS // 2, color=BLACK, lw=1, ls=":", label="checkpoint")
    left.set(xlabel="step of Adam", ylabel="loss", title=f"Training, {LAYERS} layers")
    left.legend()
    image = right.contourf(axis, axis, regions, levels=np.linspace(0, 1, 11), cmap="PuOr")
    fig.colorbar(image, ax=right, label="probability of class 1")
    for label, mark in ((0, "o"), (1, "^")):
        right.plot(*points[test][labels[test] == label].T, mark, mfc="w", mec=BLACK, ms=4, label=f"class {label}")
    right.set(xlabel="$x$", ylabel="$y$", title="What it has learned, with test points", aspect="equal")
    right.legend()
    plt.show()

# %%
# 7. When does it pay?
# --------------------
#
# One cycle each way is about three times the work of serial layers, divided by the number of ranks, and the coarse
# level is sequential. So *64 layers on two ranks do not pay*, and this tutorial was slower than serial torch. Measured,
# with width 8 and two ranks beside the fastest serial form on the same two cores (``mpiexec -n 2 python -m
# tests.benchmarks.layers``; float32, one cycle each way, m = 32): 0.40 times as fast with 64 layers, 0.97 with 256, 2.2
# with 1,024, 3.0 with 4,096. Predicted on 64 ranks: 12 times for 1,024 convolutional layers of MNIST, 2.9 for 64
# (``python -m tests.benchmarks.scaling plan mnist-conv-1024 --ranks 256``).
#
# Layers have to be many, and similar to their neighbours; or so large that one device cannot hold them: each rank
# stores its own layers and their states only.
#
# 8. What to change next
# ----------------------
#
# * **Your block.** Replace ``Block``. If it has its own skip connection (a transformer block), give ``residual=False``.
# * **Stages** of different widths, with a module between them: ``LayerParallel([stage1, stage2], transitions=[down])``.
# * **Data parallel, too.** ``Grid("2x4")``: two groups with a batch each, four ranks that share the layers.
# * **Before you queue a job**: ``pint-fem plan``, and :doc:`/howto/process-grid`.
# * **You have a TorchBraid network.** :doc:`/howto/from-torchbraid`.
# * **Continue after a time limit**: :doc:`/howto/checkpoints`. Less memory: :doc:`/howto/memory`.
# * **Ready networks**: ``demos/resnet_mnist.py``, ``demos/transformer_text.py``, ``demos/resnet_peaks.py``.
