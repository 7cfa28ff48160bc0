from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from moedge import MoEdgeError
from moedge.convert.sources import assets

CONTENT = b"some text\n"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moedge_cache: Path) -> assets.Asset:
    """A package registry that is one folder with one wheel, and a catalogue that names it."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    path = wheels / "moedge_toy_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/data.txt", CONTENT)
        info = "moedge_toy_asset-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: moedge-toy-asset\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    asset = assets.Asset(
        name="toy",
        package="moedge-toy-asset",
        version="1.0",
        wheel_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        member="toy/data.txt",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="none",
        what="a test",
    )
    monkeypatch.setattr(assets, "catalogue", lambda: {"toy": asset})
    return asset


def test_fetch_downloads_once_and_repairs_a_changed_file(
    registry: assets.Asset, moedge_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = assets.fetch("toy")
    assert path.read_bytes() == CONTENT
    assert moedge_cache in path.parents
    assert [entry.name for entry in path.parent.iterdir()] == ["data.txt"]
    path.write_bytes(b"changed")
    assert assets.fetch("toy").read_bytes() == CONTENT
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # the cache answers without a registry
    assert assets.fetch("toy") == path


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_fetch_refuses_another_file(
    field: str, registry: assets.Asset, monkeypatch: pytest.MonkeyPatch, moedge_cache: Path
) -> None:
    from dataclasses import replace

    changed = replace(registry, **{field: "0" * 64})
    monkeypatch.setattr(assets, "catalogue", lambda: {"toy": changed})
    with pytest.raises(MoEdgeError, match=r"expected 0000000000000000\.\.\."):
        assets.fetch("toy")
    assert not [path for path in moedge_cache.rglob("*") if path.is_file()]


def test_registry_out_of_reach_is_one_sentence(registry: assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(MoEdgeError, match=r"Cannot download moedge-toy-asset==1\.0 \(asset 'toy'\)"):
        assets.fetch("toy")


@pytest.mark.parametrize(("code", "wheel"), [(0, False), (1, True)])
def test_a_download_is_whole_and_without_an_error(
    code: int, wheel: bool, registry: assets.Asset, monkeypatch: pytest.MonkeyPatch, moedge_cache: Path
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if wheel:
            (Path(command[command.index("--dest") + 1]) / "toy-1.0-py3-none-any.whl").write_bytes(b"half")
        return subprocess.CompletedProcess(command, code, "", "WARNING: x\nERROR: connection lost\n")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    with pytest.raises(MoEdgeError, match="from the package registry: ERROR: connection lost Check the network"):
        assets.fetch("toy")


def test_unwritable_cache_is_one_sentence(
    registry: assets.Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEDGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(MoEdgeError, match="set MOEDGE_CACHE to a writable folder"):
        assets.fetch("toy")
