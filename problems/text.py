"""A text of characters for language models: the reference of the Python language, which every CPython has.

The text is what ``help("topics")`` prints, topic by topic (module ``pydoc_data.topics`` of the standard library, some
465,000 characters in CPython 3.11). A character is coded by its place in the sorted alphabet of the text; the target of
a passage is the passage one character later.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import TensorDataset

from pint_fem.errors import InputError
from pint_fem.resnet.grid import Grid

__all__ = ["Alphabet", "RandomPassages", "passages", "python_reference", "split"]


def python_reference() -> str:
    """The reference of the Python language, topic by topic in alphabetical order.

    Raises
    ------
    InputError
        Where this Python has been installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            f"this Python has no pydoc_data.topics ({error}): install its whole standard library, or give a file"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))


class Alphabet:
    """The characters of a text and their codes, which are their places in the sorted alphabet.

    Parameters
    ----------
    text
        At least two different characters.

    Attributes
    ----------
    characters : str
        Sorted.

    Raises
    ------
    InputError
        On a text with fewer than two different characters.
    """

    def __init__(self, text: str):
        self.characters = "".join(sorted(set(text)))
        if len(self.characters) < 2:
            raise InputError(f"a text with the characters {self.characters!r}: give one with at least two different")
        self._codes = {c: n for n, c in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> torch.Tensor:
        """Codes ``(len(text),)``, int64.

        Raises
        ------
        InputError
            On a character that is not in the alphabet.
        """
        try:
            return torch.tensor([self._codes[c] for c in text], dtype=torch.int64)
        except KeyError as error:
            raise InputError(f"{error.args[0]!r} is not in the alphabet {self.characters!r}") from None

    def decode(self, codes: torch.Tensor) -> str:
        """The text of codes ``(n,)``."""
        return "".join(self.characters[n] for n in codes.tolist())


def split(codes: torch.Tensor, length: int, test: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """The first part of a text for training, and its end for testing.

    Parameters
    ----------
    codes
        ``(n,)``.
    length
        Of the passages: each part has to hold at least one passage and one character more.
    test
        Share of the test, at least one passage.

    Raises
    ------
    InputError
        On a text that is too short.
    """
    held_out = max(length + 1, round(test * len(codes)))
    if len(codes) < held_out + length + 1:
        raise InputError(
            f"a text of {len(codes)} characters and passages of {length}: give a text of at least {2 * length + 2} "
            "characters, or shorter passages"
        )
    return codes[:-held_out], codes[-held_out:]


def passages(codes: torch.Tensor, length: int) -> TensorDataset:
    """Successive passages ``(k, length)`` of a text ``(n,)`` and their targets, for an evaluation."""
    whole = (len(codes) - 1) // length * length
    return TensorDataset(codes[:whole].view(-1, length), codes[1 : whole + 1].view(-1, length))


class RandomPassages:
    """Batches of passages at random places of a text: equal on ranks that share the layers, others for each data group.

    A batch depends on the seed, its number and the group only, so that a training can go on from any batch.

    Parameters
    ----------
    codes
        The text ``(n,)``, on every rank.
    length
        Characters of a passage.
    batch_size
        Passages in the batch of a group.
    count
        Number of batches of an epoch.
    grid
        The process grid.
    seed
        Of the places.
    first
        Number of the first batch; with :meth:`set_epoch` it is ``(epoch - 1) * count``.

    Raises
    ------
    InputError
        On a text that is shorter than a passage and one character.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        length: int,
        batch_size: int,
        count: int,
        grid: Grid,
        *,
        seed: int = 0,
        first: int = 0,
    ):
        if len(codes) < length + 1:
            raise InputError(f"a text of {len(codes)} characters: passages of {length} need at least {length + 1}")
        self.codes, self.length, self.batch_size, self.count = codes, length, batch_size, count
        self.seed, self.first = seed, first
        self._groups, self._group = grid.data_comm.size, grid.data_comm.rank

    def set_epoch(self, epoch: int) -> None:
        """Begin with the first batch of an epoch, which is counted from 1."""
        self.first = (epoch - 1) * self.count

    @property
    def sampler(self) -> RandomPassages:
        """This loader: ``loader.sampler.set_epoch(epoch)`` as of torch's ``DataLoader``."""
        return self

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of passages and targets ``(batch_size, length)``."""
        own = slice(self._group * self.batch_size, (self._group + 1) * self.batch_size)
        for number in range(self.first, self.first + self.count):
            rng = np.random.default_rng([self.seed, number])
            starts = rng.integers(0, len(self.codes) - self.length, self._groups * self.batch_size)[own]
            both = self.codes[torch.from_numpy(starts)[:, None] + torch.arange(self.length + 1)]
            yield both[:, :-1], both[:, 1:]
