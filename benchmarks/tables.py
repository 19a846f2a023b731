"""Tables of figures in the documentation, written from the records and never by hand.

A table stands in a Markdown file between two comments; what is between them is replaced:

    <!-- table: NAME -->
    <!-- end -->

:mod:`benchmarks.blocks` has the tables. ``lsgm-fast bench tables`` writes them, ``--check`` says which are out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import blocks, records
from benchmarks.measure import RESULTS, ROOT
from benchmarks.records import Record
from lsgm_fast.errors import unknown_name
from lsgm_fast.files import atomic_path

_OPENING = re.compile(r"<!-- table: (.*?) -->\n")
_END = "<!-- end -->"

Blocks = dict[str, Callable[[Sequence[Record]], str]]


def documents(root: Path = ROOT) -> list[Path]:
    """Where tables are looked for."""
    found = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "benchmarks").glob("*.md")]
    return sorted(path for path in found if path.is_file())


def results(folder: Path = RESULTS) -> list[Record]:
    """The records of all machines that are results: no dry run, and taken on an idle machine."""
    machines = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "dry-run")
    found = [record for machine in machines for record in records.read(machine)]
    return [
        Record(record.data, Path(record.source).relative_to(folder).as_posix())
        for record in found
        if record.is_result
    ]


def render(text: str, found: Sequence[Record], known: Blocks, where: str) -> tuple[str, list[str]]:
    """The text with its tables written anew, and the names of those that changed.

    Raises:
        ValueError: a table of an unknown name, or one without an end.
    """
    out, changed, at = [], [], 0
    for match in _OPENING.finditer(text):
        name, end = match[1], text.find(_END, match.end())
        following = _OPENING.search(text, match.end())
        if end < 0 or (following is not None and following.start() < end):
            raise ValueError(f"{where}: the table {name!r} has no end: write `{_END}` on a line behind it")
        if name not in known:
            raise ValueError(f"{where}: {unknown_name('table', name, known)}")
        new = "\n" + known[name](found).strip("\n") + "\n\n"  # some renderers want the blank lines
        if new != text[match.end() : end]:
            changed.append(name)
        out += [text[at : match.end()], new]
        at = end
    return "".join([*out, text[at:]]), changed


def rewrite(
    paths: Iterable[Path],
    *,
    write: bool,
    found: Sequence[Record] | None = None,
    known: Blocks = blocks.BLOCKS,
) -> dict[Path, list[str]]:
    """Bring the tables of the files up to date (``write``), or only look; the names of what changed, by file."""
    changed = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if _OPENING.search(text) is None:
            continue
        found = results() if found is None else found
        new, names = render(text, found, known, str(path))
        if names:
            changed[path] = names
            if write:
                with atomic_path(path) as temporary:
                    temporary.write_text(new, encoding="utf-8")
    return changed
