"""The report: valid against its schema, self-contained, and every string in it escaped."""

from __future__ import annotations

import copy
import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from moedge import MoEdgeError
from moedge._files import write_json
from moedge.configs.recipe import parse_recipe
from moedge.runtime import report as reports
from moedge.runtime.report import schema as report_schema
from moedge.runtime.report.build import build
from moedge.runtime.report.summary import show

HOSTILE = "<script>alert('x')</script> | [a](javascript:1) $\\frac$ & \"q\" \u00e9\u4e2d"


@pytest.fixture
def run(tmp_path: Path, sample_runs: Any) -> Path:
    return Path(sample_runs(HOSTILE).make(tmp_path))


@pytest.fixture
def report(run: Path) -> dict[str, Any]:
    return build(run, parse_recipe("model: {source: x}", name="toy").model_dump())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, sample_runs: Any) -> str:
    """The HTML of the hostile run, drawn once: plots take a second."""
    root = sample_runs(HOSTILE).make(tmp_path_factory.mktemp("page"))
    report = build(root, parse_recipe("model: {source: x}", name="toy").model_dump())
    return reports.render(report, "report.html.j2")


class _Elements(html.parser.HTMLParser):
    """Collects start tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> _Elements:
    elements = _Elements()
    elements.feed(page)
    return elements


def schema() -> dict[str, Any]:
    return dict(json.loads(reports.SCHEMA_FILE.read_text(encoding="utf-8")))


def test_the_stored_schema_is_that_of_the_types() -> None:
    assert schema() == report_schema.generate(), "write it again: python -m moedge.runtime.report.schema"


def test_a_users_limits_have_a_place_in_the_report(report: dict[str, Any]) -> None:
    report["verification"]["tolerances"] = {"file": "my.yaml", "sha256": "0" * 64}
    jsonschema.validate(report, schema())


def test_the_report_matches_its_schema(report: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(report, schema())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.pop("quality"),
        lambda report: report.update(schema="moedge.report/2"),
        lambda report: report.update(extra=1),
        lambda report: report["verification"]["parity"][0]["verdict"]["checks"][0].update(relation="<"),
        lambda report: report["verification"]["parity"][0]["phases"].pop("decode"),
        lambda report: report["conversion"].update(plan_sha256="x"),
        lambda report: report["speed"]["points"][0]["rows"][0]["tpot_ms"].pop("ci95"),
    ],
)
def test_the_schema_refuses_a_report_that_is_not_one(report: dict[str, Any], spoil: Any) -> None:
    spoil(report)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, schema())


def test_write_makes_three_files_that_agree(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    report = reports.write(run, out, recipe=parse_recipe("model: {source: x}", name="toy").model_dump())
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    elements = parse((out / "report.html").read_text(encoding="utf-8"))
    assert elements.tags.count("svg") == 5
    assert {"h1", "table", "dl"} <= set(elements.tags)


def test_html_is_self_contained(page: str) -> None:
    elements = parse(page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(elements.tags)
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    links = [value for name, value in elements.attributes if name in ("href", "xlink:href")]
    assert all(link.startswith("#") for link in links), links
    assert not re.search(r"@import|url\((?!#)", page)
    names = re.findall(r"https?://[^\s\"'<]+", page)
    assert {name for name in names if "www.w3.org" not in name} == set(), "only XML namespace names look like links"


def test_ids_are_unique_and_every_reference_in_a_plot_resolves(page: str) -> None:
    ids = [value for name, value in parse(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used, "clip paths and markers are referenced by id"
    assert used <= set(ids)


def test_hostile_strings_stay_text_in_html(page: str) -> None:
    assert "<script" not in page.lower()
    elements = parse(page)
    assert not any("javascript:" in value for name, value in elements.attributes if name != "title")
    assert "".join(elements.text).count("alert('x')") >= 10, "the label must be shown, as text, where it belongs"


def test_hostile_strings_stay_text_in_markdown(report: dict[str, Any]) -> None:
    text = reports.render(report, "report.md.j2")
    assert "<script" not in text.lower()
    assert not re.search(r"(?<!\\)\]\(", text), "no link can come out of a label"
    rows = [line for line in text.splitlines() if line.startswith("|") and "static mask" in line]
    header = next(line for line in text.splitlines() if line.startswith("| | active FFN"))
    assert re.sub(r"\\\|", "", header).count("|") == rows[0].count("|"), "a label must not add a column"


def test_the_report_says_when_the_router_loses_and_when_parity_fails(report: dict[str, Any]) -> None:
    assert any(sentence.startswith("cmoe loses") for sentence in report["sentences"])
    assert report["sentences"][0] == "All 3 checks of the exported engines against PyTorch passed."
    failed = copy.deepcopy(report)
    check = failed["verification"]["parity"][0]["verdict"]["checks"][0]
    check.update(passed=False, value=None)
    failed["verification"]["parity"][0]["verdict"]["passed"] = failed["verification"]["passed"] = failed["passed"] = (
        False
    )
    assert "FAIL" in reports.render(failed, "report.html.j2")
    assert "FAILED: ort-cpu moe vs torch moe: prefill.kl" in reports.render(failed, "report.md.j2")


def test_the_types_of_all_engines_are_told(report: dict[str, Any]) -> None:
    """PyTorch in bfloat16 beside ONNX Runtime in float32: not one type for all."""
    first, *others = report["speed"]["engines"].values()
    first["info"]["dtype"] = "bfloat16"
    assert {engine["info"]["dtype"] for engine in others} == {"float32"}
    for template in ("report.md.j2", "report.html.j2"):
        assert "bfloat16 on CPU, float32 on CPU" in reports.render(report, template)


def test_what_an_older_recipe_left_is_not_reported(run: Path) -> None:
    """``export-dense`` and ``build`` of a recipe that asked for them, in the folder of one that does not."""
    recipe = parse_recipe(
        "model: {source: x}\nexport: {targets: [ort-cpu], dense_parent: false}", name="toy"
    ).model_dump()
    want = build(run, recipe)
    shutil.copytree(run / "export", run / "export-dense")
    for name in ("export-dense", "build"):
        record = {"stage": name, "key": "0" * 64, "seconds": 1.0, "parts": {"versions": {"left": "1"}}, "outputs": {}}
        write_json(run / name / "stage.json", record)
    found = build(run, recipe)
    for part in ("bundles", "stages", "versions"):
        assert found[part] == want[part], part
    recipe["export"]["dense_parent"] = True
    assert len(build(run, recipe)["bundles"]) == 2 * len(want["bundles"])


def test_a_missing_or_damaged_result_is_one_sentence(run: Path) -> None:
    recipe = parse_recipe("model: {source: x}", name="toy").model_dump()
    (run / "bench" / "bench.json").write_text("{", encoding="utf-8")
    with pytest.raises(MoEdgeError, match=r"bench\.json cannot be read"):
        build(run, recipe)
    (run / "verify" / "verify.json").unlink()
    with pytest.raises(MoEdgeError, match=r"verify\.json is missing"):
        build(run, recipe)


def test_values_that_could_not_be_measured_are_shown_as_such(report: dict[str, Any]) -> None:
    parity = report["verification"]["parity"][0]
    for name in ("kl_ref_test", "rel_error"):
        parity["overall"][name] = dict.fromkeys(parity["overall"][name])
    parity["overall"]["top1"]["agreement"] = None
    report["verification"]["identity"][0]["max_rel_error"] = None
    for engine in report["speed"]["engines"].values():
        engine["peak_rss_mib"] = engine["load_s"] = None
    jsonschema.validate(report, schema())
    for template in ("report.html.j2", "report.md.j2"):
        text = reports.render(report, template)
        assert "None" not in text
        assert "\u2013" in text
    console = Console(width=220, force_terminal=False)
    with console.capture() as captured:
        show(report, console)
    assert "ort-cpu moe" in captured.get()


def test_the_summary_table_shows_quality_controls_verdicts_and_ratios(report: dict[str, Any]) -> None:
    console = Console(width=220, force_terminal=False)
    with console.capture() as captured:
        show(report, console)
    text = captured.get()
    for expected in ("static mask", "S6A6E16", "1.50x", "pass", "verdict: passed", "alert('x')", "cmoe loses"):
        assert expected in text


def test_a_profile_is_shown_by_part_and_by_operator(report: dict[str, Any]) -> None:
    def phase(ms: float) -> dict[str, Any]:
        rows = [{"name": "attention", "nodes": 2, "ms": ms, "share": 0.75}]
        rows.append({"name": "outside", "nodes": 0, "ms": ms / 3, "share": 0.25})
        return {"ms": 4 * ms / 3, "groups": rows, "operators": [{**rows[0], "name": "Mat<Mul>"}, rows[1]]}

    report["speed"]["profiles"] = {"ort|moe": {"prefill": phase(30), "decode": phase(1.5)}}
    markdown, html = (reports.render(report, f"report.{kind}.j2") for kind in ("md", "html"))
    assert "| decode, ms and share by part | ort\\|moe |\n|---|---:|\n| attention | 1.50 75 % |\n" in markdown
    assert "| Mat&lt;Mul&gt; | 30.00 75 % |\n| outside | 10.00 25 % |\n| all | 40.00 100 % |" in markdown
    assert '<tr><td>Mat&lt;Mul&gt;</td><td class="n">1.50 <span class="ci">75 %</span></td></tr>' in html
