"""What a machine shows of its accelerators, from files as drivers leave them, and the line that says what computes."""

from pathlib import Path

import pytest

from thinwire.cluster.cluster import Cluster, Device, Level
from thinwire.cluster.hardware import DEVICES, PRODUCTS, check_ranks, described, device_preset, found_device, found_gpus
from thinwire.errors import ConfigError

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"


def _nvidia(root: Path, models: dict[int, str], *, given: list[int] | None = None) -> Path:
    """The files of a machine with these models by minor number, of which a container has those `given`."""
    (root / "dev").mkdir()
    for name in ("nvidiactl", "nvidia-uvm", "null", *(f"nvidia{minor}" for minor in given or models)):
        (root / "dev" / name).touch()
    for minor, model in models.items():
        folder = root / f"proc/driver/nvidia/gpus/0000:{minor:02x}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(
            f"Model: \t\t {model}\nIRQ:   \t\t 120\nGPU UUID: \t GPU-1\nDevice Minor: \t {minor}\n"
        )
    return root


def _amd(root: Path) -> Path:
    (root / "dev").mkdir()
    (root / "dev/kfd").touch()
    for node, (simds, version) in enumerate([(0, 0), (1216, 90402), (1216, 90402)]):
        folder = root / f"sys/class/kfd/kfd/topology/nodes/{node}"
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"cpu_cores_count 0\nsimd_count {simds}\ngfx_target_version {version}\n")
    return root


def test_a_machine_without_a_driver_has_a_cpu(tmp_path: Path) -> None:
    assert found_gpus({}, tmp_path) == ()
    assert found_device(()) == DEVICES["cpu"]


def test_gpus_are_those_of_the_driver_that_this_process_may_open(tmp_path: Path) -> None:
    root = _nvidia(tmp_path, {number: H200 if number else H100 for number in range(11)}, given=[0, 2, 10])
    assert found_gpus({}, root) == (H100, H200, H200)


def test_a_driver_that_tells_no_models_is_still_seen(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert found_gpus({}, tmp_path) == ("NVIDIA GPU",)


def test_processors_of_amd_are_known_by_their_architecture(tmp_path: Path) -> None:
    assert found_gpus({}, _amd(tmp_path)) == ("AMD gfx942",) * 2
    assert found_gpus({"HIP_VISIBLE_DEVICES": "1"}, tmp_path) == ("AMD gfx942",)


@pytest.mark.parametrize(
    ("value", "seen"),
    [("0,2", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("1,7", 1), ("GPU-5a3c", 1), ("MIG-5a3c,MIG-77", 2), ("x", 0)],
)
def test_what_the_environment_hides_does_not_count(value: str, seen: int, tmp_path: Path) -> None:
    root = _nvidia(tmp_path, dict.fromkeys(range(4), H100))
    assert len(found_gpus({"CUDA_VISIBLE_DEVICES": value}, root)) == seen


def test_a_known_product_has_the_figures_of_its_preset_and_another_of_its_family_has_none() -> None:
    assert found_device([H200]) == device_preset("h200")
    pcie = found_device(["NVIDIA H100 PCIe"])
    assert (pcie.kind, pcie.name, pcie.peak_flops_per_s) == ("cuda", "NVIDIA H100 PCIe", None)
    assert set(PRODUCTS.values()) <= set(DEVICES)
    for device in DEVICES.values():
        if device.kind == "cuda":
            assert device.peak_flops_per_s and device.memory_bytes and device.memory_bytes_per_s


def _of(device: Device, ranks: int, *, share: bool = False) -> Cluster:
    return Cluster(device=device, levels=(Level(name="node", fanout=ranks),), share_device=share)


@pytest.mark.parametrize(
    ("cluster", "names", "says"),
    [
        (_of(DEVICES["h200"], 1), [H200], "device: NVIDIA H200 x1"),
        (_of(DEVICES["h200"], 32), [H200] * 8, "device: NVIDIA H200 x32"),
        (_of(DEVICES["cpu"], 2), [], "device: cpu"),
        (_of(DEVICES["cpu"], 2), [H200] * 8, "device: cpu (8 GPUs seen; set cluster.device)"),
        (_of(DEVICES["cpu"], 2), [H200], "device: cpu (1 GPU seen; set cluster.device)"),
        (_of(DEVICES["h100"], 2), [H200] * 2, "device: NVIDIA H200 x2 (the run file says h100)"),
        (_of(DEVICES["h100"], 16), [], "device: h100 x16 (none is seen from here)"),
        (_of(Device(name="cuda", kind="cuda"), 1), ["NVIDIA L4"], "device: NVIDIA L4 x1"),
        (_of(DEVICES["h200"], 4, share=True), [H200],
         "device: NVIDIA H200 x1 for 4 ranks, which talk over host memory"),
    ],
)  # fmt: skip
def test_the_first_line_says_what_computes(cluster: Cluster, names: list[str], says: str) -> None:
    assert described(cluster, names) == says


def test_more_ranks_than_gpus_are_refused_unless_sharing_was_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"4 ranks of this machine are more than its 1 GPU \(NVIDIA H200\)"):
        check_ranks(_of(DEVICES["h200"], 4), 4, [H200])
    check_ranks(_of(DEVICES["h200"], 4, share=True), 4, [H200])
    check_ranks(_of(DEVICES["cpu"], 4), 4, [H200])
    check_ranks(_of(DEVICES["h200"], 4), 4, [])
