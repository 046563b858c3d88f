"""How long the sentences of Markdown pages are:   python -m tests.prose README.md csrc/README.md   (a page of a commit: COMMIT:PAGE).

Counted are paragraphs and list items. Left out: code blocks, tables, headings, pictures, comments and the targets of links.
A code span counts as one word. A sentence ends at . ! or ? and at the end of its paragraph or list item, not at a colon or semicolon.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = re.compile(r"^(```|~~~).*?^\1[^\n]*$|<!--.*?-->", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
NO_PROSE = re.compile(r"\s*(\||#|-{3,}\s*$)")
ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s+")
SPAN = re.compile(r"`[^`\n]+`|`[^`]+`")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<=[.!?])[*_)\"']*\s+")
# A full stop that ends no sentence.
ABBREVIATION = re.compile(r"\b(et al|e\.g|i\.e|vs|cf)\.", re.IGNORECASE)


@dataclass(frozen=True)
class Prose:
    """A page's sentences, in words."""

    words: int
    lengths: tuple[int, ...]
    longest: str

    @property
    def median(self) -> float:
        return statistics.median(self.lengths) if self.lengths else 0.0

    @property
    def tenth_longest(self) -> int:
        """The 90th percentile: nine of ten sentences have at most as many words."""
        ordered = sorted(self.lengths)
        return ordered[-(-9 * len(ordered) // 10) - 1] if ordered else 0


def paragraphs(page: str) -> list[str]:
    """The page's paragraphs and list items, each as one line."""
    found: list[str] = []
    joins = False  # the next line goes on with the last paragraph
    for line in PICTURE.sub("", LEFT_OUT.sub("", page)).splitlines():
        item = ITEM.match(line)
        if not line.strip() or NO_PROSE.match(line) or (not item and not joins and line.startswith("    ")):
            joins = False
        elif item or not joins:
            found.append(line[item.end() :] if item else line.strip())
            joins = True
        else:
            found[-1] += " " + line.strip()
    return found


def sentences(page: str) -> list[str]:
    """The page's sentences; a code span is one word."""
    found = []
    for paragraph in paragraphs(page):
        text = SPAN.sub("\x00", LINK.sub(r"\1", paragraph))
        text = ABBREVIATION.sub(lambda hit: hit[0].replace(".", ""), text)
        found += [s for s in END.split(text) if words(s)]
    return found


def words(sentence: str) -> int:
    return sum(1 for word in sentence.split() if re.search(r"[\w\x00]", word))


def measure(page: str) -> Prose:
    """Words and sentence lengths of a page's text."""
    found = sentences(page)
    return Prose(
        sum(map(words, found)), tuple(map(words, found)), max(found, key=words, default="").replace("\x00", "`…`")
    )


def read(name: str) -> str:
    """The text of a page, or of COMMIT:PAGE."""
    if ":" in name and not Path(name).exists():
        return subprocess.run(["git", "show", name], check=True, capture_output=True, text=True).stdout
    return Path(name).read_text(encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each page."""
    parser = argparse.ArgumentParser(prog="python -m tests.prose", description=__doc__)
    parser.add_argument("pages", nargs="+", metavar="PAGE")
    parser.add_argument("--longest", action="store_true", help="show each page's longest sentence")
    args = parser.parse_args(argv)
    print(f"{'page':40} lines  words  sentences  median  90th percentile")
    for name in args.pages:
        text = read(name)
        found = measure(text)
        print(
            f"{name:40} {len(text.splitlines()):5}  {found.words:5}  {len(found.lengths):9}  {found.median:6g}  {found.tenth_longest:15}"
        )
        if args.longest:
            print(f"    {found.longest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
