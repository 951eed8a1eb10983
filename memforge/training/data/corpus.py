"""What training and evaluation see of any data: a stream of windows, and held-out sequences to score."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memforge.training.data.shards import Packed
from memforge.training.data.stream import MixtureStream, Stream, Tokens, Units, cycle_counts

# What describes a corpus in reports: counts, hashes and names.
Description: TypeAlias = dict[str, int | float | str]
# Counts of a description that add up over the parts of a mixture.
_SUMMED = ("facts", "sentences", "documents", "tokens_per_epoch", "held_out_prompts", "held_out_windows")


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

    @classmethod
    def cut(cls, flat: Tokens, lengths: npt.NDArray[np.int64]) -> "Ragged":
        """Sequences of these lengths, one after the other in `flat`."""
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Tokens:
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        return len(self.flat)

    @property
    def unit_tokens(self) -> int | None:
        """None: its sequences differ in length."""
        return None

    def take(self, indices: npt.NDArray[np.integer]) -> Tokens:
        """The sequences at `indices`, one after the other: [tokens]."""
        starts, lengths = self.offsets[indices], self.lengths[indices]
        ends = np.cumsum(lengths)
        # Token t of the output belongs to the sequence that starts at output position ends - lengths.
        shift = np.repeat(starts - (ends - lengths), lengths)
        return self.flat[shift + np.arange(len(shift))]


@dataclass(frozen=True)
class HeldOut:
    """Sequences to score. The tokens from `scored_from[i]` on are the answer; those before are given.

    With `exact_match` an answer counts as right when each of its tokens is.
    """

    sequences: Ragged
    scored_from: npt.NDArray[np.int64]
    exact_match: bool


@dataclass(frozen=True)
class Part:
    """One source, ready: its training units, what is held out of it, and what reports say of it.

    What is held out is "", and may be more under other names.
    `size` counts what only statistics ask for, `lengths` are the tokens of each document, and `packed` are the files
    that hold them all, where there are any.
    """

    units: Units
    held_out: dict[str, HeldOut]
    description: Description
    baselines: dict[str, float] = field(default_factory=dict)
    size: Description = field(default_factory=dict)
    lengths: npt.NDArray[np.integer] = field(default_factory=lambda: np.zeros(0, np.uint32))
    packed: Packed | None = None


@dataclass(frozen=True)
class Corpus:
    """Data ready for training. `description` is for reports; `baselines` are scores that need no model.

    Parts and what is held out of them go by name; a corpus of one source has the name "".
    """

    tokenizer: Tokenizer
    held_out: dict[str, HeldOut]
    description: Description
    baselines: dict[str, float]
    parts: dict[str, Part]
    weights: dict[str, float]

    @classmethod
    def of(cls, tokenizer: Tokenizer, parts: Mapping[str, Part], weights: Mapping[str, float]) -> "Corpus":
        """The corpus of one part named "", or of several with their weights."""
        held_out = {
            ".".join(filter(None, (name, kind))): held
            for name, part in parts.items()
            for kind, held in part.held_out.items()
        }
        if list(parts) == [""]:
            only = parts[""]
            return cls(tokenizer, held_out, only.description, only.baselines, dict(parts), {"": 1.0})
        baselines = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.baselines.items()}
        return cls(tokenizer, held_out, _described(parts), baselines, dict(parts), dict(weights))

    def stream(self, window: int, seed: int) -> Stream | MixtureStream:
        """The endless stream of training windows of `window` tokens."""
        streams = {name: Stream(part.units, window=window, seed=seed) for name, part in self.parts.items()}
        if list(streams) == [""]:
            return streams[""]
        return MixtureStream(list(streams.values()), cycle_counts([self.weights[name] for name in streams]), seed=seed)

    def epochs(self, windows: int, window: int) -> dict[str, float]:
        """How often the first `windows` windows of the stream pass over each part."""
        counts = cycle_counts([self.weights[name] for name in self.parts])
        return {
            name: windows * count / sum(counts) * window / part.units.num_tokens
            for (name, part), count in zip(self.parts.items(), counts, strict=True)
        }


def _described(parts: Mapping[str, Part]) -> Description:
    """Sums over all parts, then the counts of each as NAME.KEY."""
    sums: Description = {}
    for key in _SUMMED:
        values = [part.description[key] for part in parts.values() if key in part.description]
        if values:
            sums[key] = sum(int(value) for value in values)
    first = next(iter(parts.values())).description
    sums["vocabulary"] = first["vocabulary"]
    sums["corpus_sha256"] = digest(
        text for name, part in parts.items() for text in (name, str(part.description["corpus_sha256"]))
    )
    own = {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.description.items()
        if key in _SUMMED
    }
    return sums | own


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
