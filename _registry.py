"""Named rows, which other distributions and tests can add to: the targets of export, the peers of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from moedge import MoEdgeError


class _Named(Protocol):
    @property
    def name(self) -> str: ...


RowT = TypeVar("RowT", bound=_Named)


class Registry(Generic[RowT]):
    """Rows of one kind, by their names and in their order."""

    def __init__(self, kind: str, rows: Iterable[RowT], refused: Mapping[str, str] | None = None) -> None:
        """Hold ``rows``.

        Args:
            kind: what a row is, for sentences: ``target``.
            refused: names that one may expect and that are left out on purpose -> why, and what to take instead.
        """
        self._kind, self._refused = kind, refused or {}
        self._rows = {row.name: row for row in rows}

    def register(self, row: RowT) -> None:
        """Add a row of another distribution, or of a test.

        Raises:
            MoEdgeError: the name is taken.
        """
        if row.name in self._rows:
            raise MoEdgeError(f"A {self._kind} called {row.name!r} exists already.")
        self._rows[row.name] = row

    def unregister(self, name: str) -> None:
        """Take a row out that :meth:`register` added."""
        del self._rows[name]

    def every(self) -> Iterator[RowT]:
        """Iterate over the rows, in the order of tables."""
        return iter(tuple(self._rows.values()))

    def names(self, choose: Callable[[RowT], bool] = lambda _: True) -> tuple[str, ...]:
        """Return the names of the rows for which ``choose`` holds."""
        return tuple(row.name for row in self.every() if choose(row))

    def known(self, name: str) -> RowT | None:
        """Return the row called ``name``, or None."""
        return self._rows.get(name)

    def find(self, name: str) -> RowT:
        """Return the row called ``name``.

        Raises:
            MoEdgeError: there is none; why it is refused, or which there are.
        """
        if name in self._refused:
            raise MoEdgeError(f"{self._kind.capitalize()} {self._refused[name]}")
        if name not in self._rows:
            raise MoEdgeError(f"Unknown {self._kind} {name!r}; known: {', '.join(self.names())}.")
        return self._rows[name]
