"""Device profiles are whole and typed, and a target that a device cannot run is refused with what it can."""

from pathlib import Path

import pytest

from moedge import MoEdgeError
from moedge.configs import devices, files


@pytest.mark.parametrize("name", devices.names())
def test_every_packaged_profile_is_valid_and_consistent(name: str) -> None:
    device = devices.load(name)
    assert device.name == name
    assert ("tensorrt-rtx" in device.targets) == (device.compute_capability in devices.RTX_CAPABILITIES)
    for target in ("tensorrt", "tensorrt-rtx"):
        reason = devices.refusal(target, device)
        assert (reason is None) == (target in device.targets)


@pytest.mark.parametrize("name", devices.names())
def test_every_figure_of_a_packaged_profile_has_a_source(name: str) -> None:
    device = devices.load(name)
    assert set(device.sources) == set(devices.FIGURES)
    assert all(getattr(device, figure) for figure in devices.FIGURES)
    assert all("nvidia.com/" in source for source in device.sources.values()), "the vendor's own pages"
    assert device.int8_tops == pytest.approx(2 * device.fp16_tflops, rel=0.04), "twice, as on all of these"


def test_every_capability_of_tensorrt_rtx_has_a_device() -> None:
    assert {devices.load(name).compute_capability for name in devices.names()} >= set(devices.RTX_CAPABILITIES)


def test_a_jetson_is_sent_to_its_archive_and_a_data_centre_gpu_to_tensorrt() -> None:
    orin = devices.refusal("tensorrt-rtx", devices.load("jetson-agx-orin"))
    assert orin is not None
    assert "SM87" in orin
    assert "moedge pack CHECKPOINT OUT.tar --for jetson-agx-orin" in orin
    hopper = devices.refusal("tensorrt-rtx", devices.load("h100"))
    assert hopper is not None
    assert "export the target tensorrt and build the engine on the device" in hopper
    turing = devices.refusal("tensorrt", devices.load("rtx-2080-ti"))
    assert turing is not None
    assert "tensorrt-rtx" in turing
    portable = devices.refusal("portable", devices.load("rtx-4090"))
    assert portable is not None
    assert "ONNX Runtime" in portable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: x", "schema"),
        ("label: x\nlabel: y", "given twice"),
        ("a: [", "line 1: expected"),
        ("[]", "a device is a mapping"),
        (None, "No device"),
    ],
)
def test_a_bad_profile_is_one_sentence(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(MoEdgeError, match=message):
        devices.load(str(path))


def test_a_profile_of_ones_own_by_path(tmp_path: Path) -> None:
    text = files.packaged("device")["rtx-4090"].read_text().replace("memory_gib: 24", "memory_gib: 12")
    (tmp_path / "mine.yaml").write_text(text)
    device = devices.load(str(tmp_path / "mine.yaml"))
    assert (device.name, device.memory_gib, device.sm) == ("mine", 12, "SM89")


@pytest.mark.parametrize("name", ["nothing", "../rtx-4090", "configs/devices/rtx-4090"])
def test_names_are_names(name: str) -> None:
    with pytest.raises(MoEdgeError, match="No device"):
        devices.load(name)
