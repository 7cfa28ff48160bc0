"""What a CI server reads of cases with an outcome: JUnit XML, and the summary page of a GitHub job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from moedge.runtime.parity.verdict import Outcome


class Case(NamedTuple):
    """One test case: what is not passed is a failure that says so."""

    group: str
    name: str
    outcome: Outcome
    said: str


def junit_xml(suite: str, cases: Iterable[Case]) -> str:
    """JUnit XML, one test case each."""
    every = list(cases)
    failures = sum(case.outcome is not Outcome.PASSED for case in every)
    root = ElementTree.Element("testsuite", name=suite, tests=str(len(every)), failures=str(failures))
    for case in every:
        entry = ElementTree.SubElement(root, "testcase", classname=case.group, name=case.name)
        if case.outcome is not Outcome.PASSED:
            ElementTree.SubElement(entry, "failure", message=f"{case.outcome.value}: {case.said}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def step_summary(markdown: str) -> None:
    """Append to the summary of the GitHub job that this runs in; does nothing elsewhere."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(markdown + "\n")
