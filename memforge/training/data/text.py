"""The user's own text: documents joined by end tokens and cut into windows, a share of which is held out."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memforge.errors import UsageError, printable
from memforge.spec.schema import TextSpec
from memforge.training.data.corpus import HeldOut, Part, Ragged, digest
from memforge.training.data.documents import Reader, sample
from memforge.training.data.encode import pack_documents
from memforge.training.data.progress import Note
from memforge.training.data.shards import Packed, entry_key, packed_tokens
from memforge.training.data.sources import content_sha256, source_files
from memforge.training.data.stream import Indices, Tokens, shuffled
from memforge.training.data.tokenizer import end_id, num_ids


@dataclass(frozen=True)
class WindowUnits:
    """Windows of `unit_tokens` tokens of one flat sequence, without those at the sorted places `held`."""

    packed: Packed
    unit_tokens: int
    held: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return self.packed.num_tokens // self.unit_tokens - len(self.held)

    @property
    def num_tokens(self) -> int:
        return len(self) * self.unit_tokens

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.full(len(self), self.unit_tokens)

    @cached_property
    def _kept_before(self) -> npt.NDArray[np.int64]:
        """How many windows that are kept precede each that is held out."""
        return self.held - np.arange(len(self.held))

    def take(self, indices: Indices) -> Tokens:
        """The windows at `indices`, one after the other. Raises StorageError when a file has changed."""
        kept = indices.astype(np.int64)
        places = kept + np.searchsorted(self._kept_before, kept, side="right")
        return windows_at(self.packed, places, self.unit_tokens).reshape(-1)


def windows_at(packed: Packed, places: npt.NDArray[np.int64], size: int) -> Tokens:
    """The windows of `size` tokens at `places`: [places, size]. Raises StorageError when a file has changed."""
    packed.require_unchanged()
    out = np.empty((len(places), size), np.int32)
    for row, place in zip(out, places.tolist(), strict=True):
        packed.read_into(row, place * size)
    return out


class TextSource:
    """The files of a [data] table of kind text, before there is a tokenizer; `key` is the table's in errors.

    Raises UsageError when the path leads to no data.
    """

    def __init__(self, spec: TextSpec, *, root: Path, key: str) -> None:
        self.spec, self.key = spec, f"{key}.path"
        self.files = source_files(root, spec.path, self.key)
        self.reader = Reader(spec.field, self.key)

    def sample(self, characters: int) -> list[str]:
        """Text to train a tokenizer on. Raises UsageError when there is none."""
        texts = sample(self.reader, self.files, characters)
        if not texts:
            raise self._error("no text in any file")
        return texts

    def part(
        self, tokenizer: Tokenizer, *, window: int, seed: int, vocab_size: int, max_held_out: int, note: Note
    ) -> Part:
        """The windows to train on, and up to `max_held_out` of those that are held out.

        Raises UsageError when there are fewer than two windows.
        """
        packed = self._packed(tokenizer, vocab_size, note)
        num_windows = packed.num_tokens // window
        if not packed.size["documents"]:
            raise self._error("no text in any file")
        if num_windows < 2:
            raise self._error(
                f"{packed.num_tokens:,} tokens; at least {2 * window:,} are needed for train.seq_len = {window - 1}"
            )
        num_held = min(max(1, round(self.spec.held_out * num_windows)), num_windows - 1)
        # In random order, so that the first `max_held_out` of them are a fair sample.
        held = shuffled(num_windows, seed)[:num_held].copy()
        units = WindowUnits(packed, window, np.sort(held))
        scored = windows_at(packed, held[:max_held_out], window)
        return Part(
            units=units,
            held_out={
                "": HeldOut(
                    Ragged.cut(scored.reshape(-1), np.full(len(scored), window)),
                    np.ones(len(scored), dtype=np.int64),
                    exact_match=False,
                )
            },
            description={
                "documents": int(packed.size["documents"]),
                "tokens_per_epoch": units.num_tokens,
                "held_out_windows": num_held,
                "vocabulary": tokenizer.get_vocab_size(),
                "corpus_sha256": str(packed.size["corpus_sha256"]),
            },
            size={name: packed.size[name] for name in ("documents", "characters", "bytes")}
            | {"tokens": packed.num_tokens, "held_out_tokens": num_held * window},
            lengths=packed.lengths,
            packed=packed,
        )

    def _packed(self, tokenizer: Tokenizer, vocab_size: int, note: Note) -> Packed:
        end = end_id(tokenizer)
        key = entry_key(
            sources=content_sha256(self.files, note),
            field=self.spec.field,
            tokenizer=digest([tokenizer.to_str()]),
            end=end,
        )
        return packed_tokens(
            key,
            lambda writer: pack_documents(writer, self.reader, self.files, tokenizer, end, note),
            num_ids=num_ids(tokenizer),
            vocab_size=vocab_size,
            note=note,
        )

    def _error(self, what: str) -> UsageError:
        return UsageError(f"{self.key} {printable(self.spec.path)}: {what}")
