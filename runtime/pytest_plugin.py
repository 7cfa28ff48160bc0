"""The pytest plugin: ``pytest --moedge-bundle DIR --moedge-reference FILE`` gives a user's tests an engine to gate on.

pytest loads this file in every run of an environment that has MoEdge (entry point ``pytest11``). So it imports nothing
of ours but the package's own, light ``__init__``; engines are imported by the fixture that a test asks for, and the
hooks that add to reports are registered only when there is a bundle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moedge import MoEdgeError

if TYPE_CHECKING:
    from moedge.runtime.engines import Engine
    from moedge.runtime.parity.results import Verification

BUNDLE, REFERENCE, TOLERANCES = "--moedge-bundle", "--moedge-reference", "--moedge-tolerances"
TEXT, TOKENS, THREADS = "--moedge-text", "--moedge-tokens", "--moedge-threads"
_TEXT, _TOKENS = "asset:wiki", 2048
_SECTION = "moedge verify"
_RESULT = pytest.StashKey[str]()
"""What a failing test shows of the verification."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of :func:`moedge_engine` and :func:`moedge_parity`."""
    group = parser.getgroup("moedge", "MoEdge: gate an engine")
    group.addoption(BUNDLE, metavar="DIR", help="Bundle, engine or checkpoint that moedge_engine opens.")
    group.addoption(
        REFERENCE,
        metavar="FILE_OR_CHECKPOINT",
        help="What moedge_parity judges it by: a kept reference (.safetensors, no torch needed), or a checkpoint.",
    )
    group.addoption(TOLERANCES, metavar="FILE", help="YAML file of limits that take the place of the packaged ones.")
    group.addoption(
        TEXT, metavar="TEXT", help=f"Beside a checkpoint: asset:NAME or a file to compare on; {_TEXT} by default."
    )
    group.addoption(
        TOKENS, type=int, metavar="N", help=f"Beside a checkpoint: tokens to compare on; {_TOKENS} by default."
    )
    group.addoption(THREADS, type=int, metavar="N", help="CPU threads; all physical cores by default.")


def pytest_configure(config: pytest.Config) -> None:
    """Add what was found to the reports of failing tests, in runs that gate an engine."""
    if config.getoption(BUNDLE) is not None:
        config.pluginmanager.register(_Reports(config), "moedge-reports")


class _Reports:
    """Shows the verification where a test fails that asked for it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        shown = self.config.stash.get(_RESULT, None)
        if shown and report.failed and "moedge_parity" in getattr(item, "fixturenames", ()):
            report.sections.append((_SECTION, shown))
        return report


@pytest.fixture(scope="session")
def moedge_engine(pytestconfig: pytest.Config) -> Iterator[Engine]:
    """The engine of ``--moedge-bundle`` (:class:`moedge.runtime.engines.Engine`), closed at the end of the session.

    A test that asks for it is skipped without that option, and is an error in one sentence where it cannot be opened.
    """
    bundle = _bundle(pytestconfig)
    with _in_a_sentence():
        from moedge.runtime.engines import open_engine

        engine = open_engine(bundle, threads=pytestconfig.getoption(THREADS))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="session")
def moedge_parity(pytestconfig: pytest.Config) -> Verification:
    """What ``moedge verify`` says of the bundle: JSON of schema ``moedge.verify/1`` (:func:`moedge.verify`).

    ``moedge_parity["outcome"]`` is ``passed``, ``failed`` or ``not decided``. Judged by ``--moedge-reference``: a kept
    reference on its own text without torch, or a checkpoint or portable bundle, as ``moedge verify REFERENCE BUNDLE``
    does. It runs once in a session, and GitHub's job summary gets it, as from the command. A test that asks for it is
    skipped without a bundle, and is an error without a reference: a gate that was asked for must not be silent.
    """
    bundle = _bundle(pytestconfig)
    with _in_a_sentence():
        result = _verified(bundle, pytestconfig)
    from moedge.runtime.report import checks, ci

    pytestconfig.stash[_RESULT] = _told(result)
    ci.step_summary(checks.markdown(result))
    return result


def _told(result: Verification) -> str:
    """The outcome, every check that did not pass, and what the comparisons say, in lines."""
    from moedge.runtime.parity.outcomes import mark
    from moedge.runtime.parity.verdict import Outcome
    from moedge.runtime.report import checks

    missed = [row for row in checks.rows(result) if row.outcome is not Outcome.PASSED]
    lines = [
        f"{row.comparison}: {row.name} is {row.shown}, must be {row.relation} {row.limit:g}: {mark(row.outcome).word}"
        for row in missed
    ]
    return "\n".join([mark(result["outcome"]).verdict, *lines, *checks.said(result)])


def _bundle(config: pytest.Config) -> Path:
    given: str | None = config.getoption(BUNDLE)
    if given is None:
        pytest.skip(f"There is no engine to gate: give {BUNDLE} DIR.")
    if not given:
        pytest.fail(f"{BUNDLE} is empty; give the folder of a bundle.", pytrace=False)
    return Path(given)


def _verified(bundle: Path, config: pytest.Config) -> Verification:
    """Judge the bundle by what the options name.

    Raises:
        MoEdgeError: no reference, options that do not go together, or something cannot be opened or compared.
    """
    reference, text, tokens = (config.getoption(name) for name in (REFERENCE, TEXT, TOKENS))
    if not reference:
        raise MoEdgeError(f"Nothing to judge {bundle} by: give {REFERENCE} with a kept reference or a checkpoint.")
    from moedge.runtime.parity import given
    from moedge.runtime.parity.sample import Sample

    options: dict[str, Any] = {
        "tolerances": config.getoption(TOLERANCES) or "float32",
        "threads": config.getoption(THREADS),
    }
    if Path(reference).suffix == ".safetensors":
        if text or tokens:
            raise MoEdgeError(f"{reference} holds the text that it judges on; leave out {TEXT} and {TOKENS}.")
        return given.against_kept(bundle, Path(reference), **options)
    sample = Sample(text or _TEXT, tokens or _TOKENS)
    return given.verify_given(Path(reference), bundle, sample=sample, **options)


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """What a user can mend is a message without a traceback."""
    try:
        yield
    except MoEdgeError as error:
        pytest.fail(f"{error}", pytrace=False)
