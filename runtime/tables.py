"""Tables for a terminal of any width from 80 columns on: no cell is cut and no word broken.

Rich shortens what does not fit ("portab...") or breaks it within a word. A :class:`Sheet` wraps between words instead,
and where even that is too wide it is printed as several tables below each other, each with the first column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_GAP = 2
_LONGEST = 40
"""Words longer than this (paths, hashes) may be folded: no layout holds them."""


@dataclass
class Sheet:
    """A table by headers and rows of strings with rich's markup; print it with :meth:`rich.console.Console.print`."""

    title: str = ""
    show_header: bool = True
    headers: list[str] = field(default_factory=list)
    justify: list[Literal["left", "right"]] = field(default_factory=list)
    rows: list[tuple[list[str], str]] = field(default_factory=list)

    def add_column(self, header: str = "", *, justify: Literal["left", "right"] = "left") -> None:
        """Add a column; its header may hold markup."""
        self.headers.append(header)
        self.justify.append(justify)

    def add_row(self, *cells: str, style: str = "") -> None:
        """Add a row; missing cells are empty, and so are missing columns' headers."""
        while len(self.headers) < len(cells):
            self.add_column()
        self.rows.append(([*cells, *[""] * (len(self.headers) - len(cells))], style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the table out for the console's width."""
        if self.title:
            yield Text.from_markup(self.title, style="italic")
        texts = [[self.headers[i] if self.show_header else "", *(row[i] for row, _ in self.rows)] for i in self._all()]
        needed = [(_longest_word(cells), _longest_line(cells)) for cells in texts]
        for number, columns in enumerate(_blocks(needed, options.max_width)):
            if number:
                yield ""
            yield self._table(columns, _widths([needed[i] for i in columns], options.max_width))

    def _all(self) -> range:
        return range(len(self.headers))

    def _table(self, columns: Sequence[int], widths: Sequence[int]) -> Table:
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=self.show_header)
        for i, width in zip(columns, widths, strict=True):
            table.add_column(self.headers[i], justify=self.justify[i], width=width, overflow="fold")
        for cells, style in self.rows:
            table.add_row(*(cells[i] for i in columns), style=style)
        return table


def _blocks(needed: Sequence[tuple[int, int]], width: int) -> Iterator[list[int]]:
    """Split columns into tables that fit when every cell is wrapped between words; the first column is in each."""
    block: list[int] = []
    for i, (least, _) in enumerate(needed):
        taken = sum(needed[j][0] + _GAP for j in block)
        if len(block) > 1 and taken + least > width:
            yield block
            block = [0]
        block.append(i)
    yield block


def _widths(needed: Sequence[tuple[int, int]], width: int) -> list[int]:
    """Give each column its longest line, and take from the widest down to its longest word until all fit."""
    widths = [most for _, most in needed]
    over = sum(widths) + _GAP * (len(widths) - 1) - width
    while over > 0:
        spare = [have - least for have, (least, _) in zip(widths, needed, strict=True)]
        if max(spare) <= 0:
            break
        # The widest of those that can give way, so that no column is squeezed while another one has room.
        i = max((i for i in range(len(widths)) if spare[i] > 0), key=lambda i: widths[i])
        widths[i] -= 1
        over -= 1
    return widths


def _lines(cells: Sequence[str]) -> list[Text]:
    return [line for cell in cells for line in Text.from_markup(cell).split("\n")]


def _longest_line(cells: Sequence[str]) -> int:
    return max((line.cell_len for line in _lines(cells)), default=0)


def _longest_word(cells: Sequence[str]) -> int:
    words = (Text(word).cell_len for line in _lines(cells) for word in line.plain.split())
    return min(max(words, default=0), _LONGEST)
