"""What training and evaluation see of any data: units of tokens to shuffle, and held-out sequences to score."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Ragged:
    """Token sequences laid end to end: sequence i is flat[offsets[i] : offsets[i + 1]]."""

    flat: Tokens
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Iterable[list[int]]) -> "Ragged":
        kept = list(sequences)
        offsets = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in kept], out=offsets[1:])
        return cls(np.fromiter((t for s in kept for t in s), np.int32, int(offsets[-1])), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Tokens:
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class HeldOut:
    """Sequences to score. The tokens from `scored_from[i]` on are the answer; those before are given."""

    sequences: Ragged
    scored_from: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Data ready for training. `facts` describes it for reports; `baselines` are scores that need no model."""

    tokenizer: Tokenizer
    units: Ragged
    held_out: HeldOut
    description: dict[str, int | float | str]
    exact_match: bool
    baselines: dict[str, float] = field(default_factory=dict)


class Stream:
    """An endless stream of tokens: all units in a new order each epoch, cut into windows.

    Every epoch holds the same number of tokens, so the window at any position is a pure function of
    (units, seed, position) and a run can start anywhere.
    """

    def __init__(self, units: Ragged, *, window: int, seed: int) -> None:
        self.units, self.window, self.seed = units, window, seed
        self.epoch_tokens = len(units.flat)
        self._epoch: tuple[int, Tokens] | None = None

    def windows(self, start: int, count: int) -> Tokens:
        """Windows start..start+count: [count, window]."""
        position, wanted = start * self.window, count * self.window
        parts = []
        while wanted:
            epoch, offset = divmod(position, self.epoch_tokens)
            part = self._tokens(epoch)[offset : offset + wanted]
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        return np.concatenate(parts).reshape(count, self.window)

    def _tokens(self, epoch: int) -> Tokens:
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.Generator(np.random.Philox(key=(self.seed << 64) + epoch)).permutation(len(self.units))
            self._epoch = (epoch, np.concatenate([self.units[int(i)] for i in order]))
        return self._epoch[1]


def digest(texts: Iterable[str]) -> str:
    """SHA-256 over texts, each ended by a zero byte: the identity of a corpus."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode())
        sha.update(b"\0")
    return sha.hexdigest()


def split_evenly(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
