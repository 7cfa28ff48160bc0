"""The study: one YAML file that compares conversion methods, and switches of a method, under one fixed protocol.

``moedge ablate`` runs it. A row is a method with its parameters, or a control of a method's row; every row is measured
at every sparsity on the same held-out windows. ``studies/*.yaml`` document every key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moedge.configs import files as yaml_files
from moedge.configs.errors import checked, nearest, sentences
from moedge.configs.recipe import CONVERT_SECTIONS, ModelSection, Name, NonNegative, Positive, Spec
from moedge.convert.methods import METHODS


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Text(_Section):
    """Windows of one text: ``calibration`` of its first documents and ``held_out`` of those kept back.

    A text without calibration windows is held out whole.
    """

    source: Spec
    holdout_every: Annotated[int, Field(ge=2)] = 10
    calibration: NonNegative = 32
    held_out: NonNegative = 16


class Row(_Section):
    """A method with parameters, or a control of the row named ``of`` (the first method row by default)."""

    label: Annotated[str, Field(min_length=1)]
    method: str | None = None
    control: str | None = None
    of: str | None = None
    set: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_kind(self) -> Row:
        if (self.method is None) == (self.control is None):
            raise ValueError("give either `method` or `control`.")
        if self.control is None and self.of is not None:
            raise ValueError("`of` belongs to a control.")
        if self.control is not None and self.set:
            raise ValueError("`set` belongs to a method; a control has no parameters.")
        return self


class Sparsity(_Section):
    """A share of the FFN that is skipped, or read: parameters of each method that reach it."""

    name: Annotated[str, Field(min_length=1)]
    methods: dict[str, dict[str, Any]]


def _check_method(name: str, where: str) -> None:
    if name not in CONVERT_SECTIONS:
        known = f"{', '.join(CONVERT_SECTIONS)}{nearest(name, list(CONVERT_SECTIONS))}"
        raise ValueError(f"{where}: unknown method {name!r}; known: {known}.")


class Study(_Section):
    """A whole comparison."""

    name: Name
    model: ModelSection
    texts: Annotated[list[Text], Field(min_length=1)]
    window: Annotated[int, Field(ge=8)] = 512
    bos: bool | None = None
    """Whether windows start with the BOS token; None: where the tokenizer starts every text with it."""
    batch_size: Positive = 4
    axis: Literal["skipped", "read"] = "skipped"
    """What the names of ``sparsities`` count: neurons that are skipped, or weights that are read."""
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = [0, 1, 2]
    sparsities: Annotated[list[Sparsity], Field(min_length=1)]
    rows: Annotated[list[Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _rows_agree(self) -> Study:
        from moedge.convert.methods.baselines import CONTROLS

        labels = [row.label for row in self.rows]
        if len(set(labels)) != len(labels):
            raise ValueError("rows: a label is used twice; give each row its own.")
        made = {row.label for row in self.rows if row.method}
        if not made:
            raise ValueError("rows: no row has a `method`; controls need one to compare with.")
        for row in self.rows:
            if row.control is not None:
                if row.control not in CONTROLS:
                    known = ", ".join(CONTROLS)
                    raise ValueError(f"rows: {row.label}: unknown control {row.control!r}; known: {known}.")
                if row.of is not None and row.of not in made:
                    raise ValueError(f"rows: {row.label}: no method row is called {row.of!r}.")
                continue
            for sparsity in self.sparsities:
                self.parameters(row, sparsity)
        self._check_sparsities()
        if sum(text.calibration for text in self.texts) < 2:
            raise ValueError("texts: fewer than 2 calibration windows; methods compare windows.")
        if not any(text.held_out for text in self.texts):
            raise ValueError("texts: no held_out windows; there is nothing to measure on.")
        return self

    def _check_sparsities(self) -> None:
        """Refuse parameters of what is no method: its rows would silently have the defaults."""
        for sparsity in self.sparsities:
            for name in sparsity.methods:
                _check_method(name, f"sparsities: {sparsity.name}")

    def parameters(self, row: Row, sparsity: Sparsity) -> dict[str, Any]:
        """Return the checked parameters of a method's row at a sparsity, with the method's defaults.

        Raises:
            ValueError: an unknown method or parameter, or an impossible value.
        """
        assert row.method is not None
        _check_method(row.method, f"rows: {row.label}")
        section = CONVERT_SECTIONS[row.method]
        if "domains" in METHODS[row.method].needs:
            raise ValueError(f"rows: {row.label}: {row.method} reads texts of its own; run it by a recipe.")
        given = {"method": row.method, **sparsity.methods.get(row.method, {}), **row.set}
        try:
            return section.model_validate(given).model_dump(mode="json", exclude={"method"})
        except ValidationError as error:
            where = f"rows: {row.label} at {sparsity.name}"
            raise ValueError("\n".join(f"{where}: {line}" for line in sentences(error, section))) from None

    def parent(self, row: Row) -> Row:
        """Return the method row that a control belongs to."""
        wanted = row.of or next(other.label for other in self.rows if other.method)
        return next(other for other in self.rows if other.label == wanted)


def load_study(name_or_path: str | Path) -> Study:
    """Read and check a study: the name of a packaged one, or a path to a YAML file.

    Raises:
        MoEdgeError: no such study, not YAML, or a key that is unknown, of a wrong type or impossible.
    """
    path, text = yaml_files.read(name_or_path, "study")
    return checked(Study, yaml_files.parse(text, str(path), "study"), where=str(path))
