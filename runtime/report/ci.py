"""What a CI server reads: JUnit XML of cases, and the summary page of a GitHub job."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
"""GitHub Actions names by this variable the file whose Markdown it shows on a job's page."""


class Case(NamedTuple):
    """One test case; ``said`` is why it is a failure or skipped."""

    group: str
    name: str
    state: Literal["passed", "failure", "skipped"] = "passed"
    said: str = ""


def junit_xml(name: str, cases: Iterable[Case]) -> str:
    """JUnit XML of one suite."""
    suite = ElementTree.Element("testsuite", name=name)
    for case in cases:
        entry = ElementTree.SubElement(suite, "testcase", classname=case.group, name=case.name)
        if case.state != "passed":
            ElementTree.SubElement(entry, case.state, message=case.said)
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def step_summary(markdown: str) -> None:
    """Append to the summary of the GitHub job that this runs in; does nothing elsewhere.

    Nobody asked for that file, so what keeps it from being written changes no outcome and is said on stderr.
    """
    if path := os.environ.get(STEP_SUMMARY):
        try:
            with Path(path).open("a", encoding="utf-8") as stream:
                stream.write(markdown + "\n")
        except OSError as error:
            print(f"warning: the job's summary was not written ({STEP_SUMMARY}): {error}", file=sys.stderr)
