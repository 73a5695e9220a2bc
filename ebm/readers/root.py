"""ROOT files through uproot: the tree of events, and trees with one value per branch as tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebm.events import DataError
from ebm.readers.arrays import unreadable
from ebm.readers.layout import Table, TableReader, as_strings
from ebm.readers.nanoaod import NanoAOD, is_nanoaod

if TYPE_CHECKING:
    import uproot

    from ebm.readers import Options, Reader

_NUMBER = re.compile(r"(std::)?(float|double|bool|u?int(8|16|32|64)_t|char|unsigned char)")
_TEXT = ("char*", "std::string")


def open_tree(path: Path, options: Options) -> Reader:
    """NanoAOD becomes `hep64-v1`; other trees, and NanoAOD where features are chosen, give their flat branches."""
    import uproot

    _refuse_truncated(path)
    try:
        file = uproot.open(path)
        trees = [name for name, kind in file.classnames(cycle=False).items() if kind in ("TTree", "ROOT::RNTuple")]
        chosen = options.tree or ("Events" if "Events" in trees else trees[0] if len(trees) == 1 else None)
        if chosen not in trees:
            wanted = f"no tree {chosen!r}" if chosen else "several trees, choose one with the option 'tree'"
            raise DataError(f"{path}: {wanted if trees else 'no tree of events'}; it has {', '.join(trees) or 'none'}")
        tree = file[chosen]
        if tree.num_entries == 0:
            raise DataError(f"{path}: tree {chosen} has no events")
        if not options.features and is_nanoaod(set(tree.keys())):
            return NanoAOD(path, tree, options)
        return TableReader(RootTable(path, tree, options.features), options)
    except DataError:
        raise
    except Exception as error:  # uproot's errors for what is damaged are of every kind
        raise unreadable(path, "ROOT", error) from None


def entries(path: Path, tree: uproot.TTree, names: Sequence[str], step: str | int, library: str) -> Iterator:
    """`tree.iterate`, whose errors name the file."""
    wanted = set(names)
    pieces = tree.iterate(filter_name=lambda name: name in wanted, step_size=step, library=library)
    while True:
        try:
            piece = next(pieces)
        except StopIteration:
            return
        except Exception as error:
            raise unreadable(path, "ROOT", error) from None
        yield piece


class RootTable(Table):
    """The branches of a tree that have one value per event."""

    word = "branch"

    def __init__(self, path: Path, tree: uproot.TTree, features: Sequence[str] | None) -> None:
        import uproot

        super().__init__(path)
        self.tree = tree
        names = tree.keys(full_paths=False) if isinstance(tree, uproot.TTree) else tree.keys(recursive=False)
        types = {name: tree[name].typename for name in names}
        self.names = [name for name, kind in types.items() if _NUMBER.fullmatch(kind) or kind in _TEXT]
        self.text = frozenset(name for name in self.names if types[name] in _TEXT)
        self.uneven = [name for name in types if name not in self.names]
        for name in features or ():
            if name in types and name not in self.names:
                raise DataError(f"{path}, branch {name}: expected one number per event, given {types[name]}")

    def read(self, names: Sequence[str], strings: frozenset[str], step: str | int) -> Iterator[dict[str, np.ndarray]]:
        for piece in entries(self.path, self.tree, names, step, "np"):
            yield {n: as_strings(piece[n]) if n in strings else piece[n].astype(np.float64) for n in names}


def _refuse_truncated(path: Path) -> None:
    """A ROOT file says in its first bytes where it ends."""
    with open(path, "rb") as f:
        head = f.read(20)
    if head[:4] != b"root":
        raise DataError(f"{path}: expected a ROOT file by its name, given another kind of file")
    large = int.from_bytes(head[4:8], "big") >= 1_000_000
    end, size = int.from_bytes(head[12 : 20 if large else 16], "big"), path.stat().st_size
    if size < end:
        raise DataError(f"{path}: the ROOT file is truncated: {size} of its {end} bytes are there")
