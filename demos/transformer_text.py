"""Train a deep character transformer on the reference of the Python language, its blocks shared out over MPI ranks.

    mpiexec -n 2 python demos/transformer_text.py --grid 1x2
    mpiexec -n 2 python demos/transformer_text.py --steps 300 --compare-serial      (beside the same in plain torch)
    python demos/transformer_text.py --text my.txt --blocks 128 --width 64          (another text, UTF-8)

The blocks are pre-norm transformer blocks with causal attention and dropout, written in plain torch
(demos/network_blocks.py); a block's output is the next state. The text is part of every Python: what help() prints.

Writes to --out: curves.png, samples.txt (text by the network before and after the training), summary.json, checkpoint/
(a run that was interrupted goes on from there).
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demos.outputs import Outputs
from demos.resnet_common import add_common_options, build_grid, plot_curves, report, solver_options
from pint_fem.capacity import require_memory
from pint_fem.cli import ProgramParser, positive, run
from pint_fem.errors import InputError

NEXT_STEP = "read samples.txt; then a text of your own: --text FILE --fresh"
TEST, CLIP, WEIGHT_DECAY = 0.02, 1.0, 0.01


def arguments():
    """Options of the program."""
    parser = ProgramParser(prog="transformer_text.py", description=__doc__, petsc=False, next_step=NEXT_STEP)
    add = parser.add_argument
    add("--text", type=Path, help="a text file in UTF-8 (the reference of the Python language)")
    add("--blocks", type=positive(int), default=64, help="transformer blocks (64)")
    add("--width", type=positive(int), default=32, help="features of a state (32)")
    add("--heads", type=positive(int), default=4, help="heads of the attention (4)")
    add("--length", type=positive(int), default=64, help="characters of a passage (64)")
    add("--dropout", type=positive(float, zero=True), default=0.1, help="share of values set to zero (0.1)")
    add("--steps", type=positive(int), default=1000, help="batches of the training (1000)")
    add("--every", type=positive(int), default=50, help="batches between two records and checkpoints (50)")
    add("--sample", type=positive(int, zero=True), default=300, help="characters of a sample text (300)")
    add_common_options(parser, batch=8, lr=6e-3, out="results/text", coarsening=4, schedule="one-cycle")
    parser.set_defaults(warm=False, multilevel=1, tikhonov=0.0, smoothness=0.0, classifier=0.0)
    opts = parser.read()
    opts.every = min(opts.every, opts.steps)
    if opts.steps % opts.every:
        raise InputError(f"--steps {opts.steps}: give a multiple of --every {opts.every}")
    if opts.width % opts.heads:
        raise InputError(f"--width {opts.width}: give a multiple of --heads {opts.heads}")
    if opts.dropout >= 1:
        raise InputError(f"--dropout {opts.dropout:g}: give a share below 1")
    opts.layers, opts.epochs = opts.blocks, opts.steps // opts.every
    return opts


def read_text(opts, grid):
    """The text, read on the first rank (collective)."""
    from pint_fem import files
    from pint_fem.collective import on_first_rank
    from problems.text import python_reference

    def read():
        if opts.text is None:
            return python_reference()
        files.require_regular(opts.text, "text", links=True)
        with files.as_input_error(f"{opts.text} cannot be read as UTF-8", "give a text file", (OSError, ValueError)):
            return opts.text.read_text(encoding="utf-8")

    return on_first_rank(grid.comm, "text", read)


def task(opts, grid, alphabet, codes):
    """The network and the passages that it is trained on."""
    import torch
    from mpi4py import MPI

    from demos.network_blocks import AttentionBlock, CharacterEmbedding, CharacterLogits
    from demos.network_training import Task
    from pint_fem.resnet import Grid, LayerParallel
    from problems.text import RandomPassages, passages, split

    training, test = split(codes, opts.length, TEST)

    def build(depth, on):
        torch.manual_seed(opts.seed)
        opening = CharacterEmbedding(len(alphabet), opts.length, opts.width, opts.dropout)
        blocks = [AttentionBlock(opts.width, opts.heads, depth, opts.dropout) for _ in range(depth)]
        closing = CharacterLogits(len(alphabet), opts.width)
        how = solver_options(opts, depth)
        net = LayerParallel(blocks, opening=opening, closing=closing, residual=False, grid=on, **how)
        net.serial = opts.mode == "serial"
        return net

    return Task(
        parallel=lambda depth: build(depth, grid),
        serial=lambda depth: build(depth, Grid(comm=MPI.COMM_SELF)).serial_copy(),
        data=training,
        test=passages(test, opts.length),
        loader=lambda batch, on: RandomPassages(training, opts.length, batch, opts.every, on, seed=opts.seed),
        optimizer=partial(torch.optim.AdamW, weight_decay=WEIGHT_DECAY),
        clip=CLIP,
    )


def sample(net, alphabet, opts, prompt, temperature=0.7):
    """A text that the network continues, character by character (collective): all ranks have the same random numbers.

    The next character is drawn from the softmax of the logits divided by the temperature.
    """
    import torch

    net.eval()
    codes, generator = alphabet.encode(prompt), torch.Generator().manual_seed(opts.seed)
    with torch.no_grad():
        for _ in range(opts.sample):
            logits = net(codes[None, -opts.length :])[0, :, -1]
            new = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)
            codes = torch.cat([codes, new])
    return alphabet.decode(codes)


def write_samples(path, samples):
    """The texts before and after the training."""
    path.write_text("\n\n".join(f"--- {when} the training\n{text}" for when, text in samples.items()) + "\n", "utf-8")


def main():
    """Train."""
    opts = arguments()

    from demos.network_training import on_root, train
    from pint_fem.digests import digest
    from problems.text import Alphabet

    grid = build_grid(opts)
    size = 4 * (8 * opts.width**2 + 13 * opts.width)
    require_memory(grid.comm, opts.blocks * size, f"{opts.blocks} blocks of width {opts.width}", "give fewer")
    text = read_text(opts, grid)
    alphabet = Alphabet(text)
    say = on_root(grid)
    opts.text = f"{opts.text or 'pydoc_data.topics'} (digest {digest(text):x})"
    say(f"{opts.text}: {len(text)} characters, {len(alphabet)} different ones")
    job = task(opts, grid, alphabet, alphabet.encode(text))
    net, prompt = job.parallel(opts.blocks), text[:16]
    samples = {"before": sample(net, alphabet, opts, prompt)}
    outcome = train(opts, grid, job, net=net)
    samples["after"] = sample(net, alphabet, opts, prompt)
    say(f"the network's text after the training, beginning with {prompt!r}:\n{samples['after']}")
    outputs = Outputs(grid.comm)
    path = opts.out / "curves.png"
    title = f"{opts.blocks} transformer blocks of width {opts.width}: next character of a text"
    plot = partial(plot_curves, quantity="next character (%)", epoch=f"{opts.every} batches")
    outputs.on_root(str(path), plot, path, outcome, title)
    outputs.on_root(str(opts.out / "samples.txt"), write_samples, opts.out / "samples.txt", samples)
    facts = {"problem": "next character", "characters": len(text), "alphabet": len(alphabet), "samples": samples}
    report(opts, grid, outcome, facts, outputs)


if __name__ == "__main__":
    run(main)
