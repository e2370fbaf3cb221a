"""Memory: the least of all limits counts, and what does not fit is refused with what would."""

import pytest
import torch

from upfeat import machine
from upfeat.failures import failure_reason
from upfeat.machine import available_memory, check_fits, readable

GIB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a system of 8 GiB, of which 6 are available, without limits."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {8 << 20} kB\nMemAvailable: {6 << 20} kB\n")
    (proc / "self" / "cgroup").write_text("")
    (proc / "self" / "status").write_text(f"VmSize: {1 << 20} kB\nVmData: {1 << 19} kB\n")
    groups.mkdir()
    monkeypatch.setattr(machine, "_PROC", proc)
    monkeypatch.setattr(machine, "_CGROUPS", groups)
    return tmp_path


def _group(folder, limit, usage, cached, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage, f"anon 1\n{names[3]} {cached}\n"), strict=False):
        (folder / name).write_text(f"{value}\n")


V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")


def test_what_the_system_has(system):
    assert available_memory() == 6 * GIB


def test_every_control_group_up_to_the_root_counts(system):
    (system / "proc" / "self" / "cgroup").write_text("0::/batch/job\n")
    _group(system / "cgroup" / "batch" / "job", "max", 5 * GIB, 0, V2)
    assert available_memory() == 6 * GIB
    _group(system / "cgroup" / "batch", 4 * GIB, 3 * GIB, GIB, V2)
    assert available_memory() == 2 * GIB
    # In a container the group's own path is not there: its limits are those of the root.
    (system / "proc" / "self" / "cgroup").write_text("0::/../elsewhere\n")
    _group(system / "cgroup", GIB, 3 * GIB, 0, V2)
    assert available_memory() == 0


def test_control_groups_of_version_1(system):
    (system / "proc" / "self" / "cgroup").write_text("4:cpu,memory:/docker/x\n1:name=systemd:/\n")
    _group(system / "cgroup" / "memory", 2**63 - 4096, GIB, 0, V1)
    assert available_memory() == 6 * GIB
    _group(system / "cgroup" / "memory" / "docker" / "x", 3 * GIB, 2 * GIB, GIB // 2, V1)
    assert available_memory() == 3 * GIB // 2


@pytest.mark.parametrize(("limit", "field"), [("RLIMIT_AS", 1 << 30), ("RLIMIT_DATA", 1 << 29)])
def test_limits_of_the_process(system, monkeypatch, limit, field):
    resource = pytest.importorskip("resource")
    limits = {getattr(resource, limit): 2 * GIB}
    monkeypatch.setattr(
        machine.resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY),) * 2
    )
    assert available_memory() == 2 * GIB - field


def test_a_system_that_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "resource", None)
    assert available_memory() is None
    check_fits("x", (10**6, 10**6), None, 1e6)


def test_the_size_that_is_named_fits(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda device=None: GIB)
    with pytest.raises(ValueError, match="at most about") as caught:
        check_fits("photo.jpg", (400, 600), 6000, 1000)
    text = str(caught.value)
    assert "photo.jpg: 6000×9000" in text
    assert "54.0 GB" in text
    fitting = int(text.rpartition(" ")[2])
    check_fits("photo.jpg", (400, 600), fitting, 1000)
    with pytest.raises(ValueError):
        check_fits("photo.jpg", (400, 600), round(1.1 * fitting), 1000)


def test_decoding_counts_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda device=None: GIB)
    with pytest.raises(ValueError, match="decoding its 10000×10000 pixels"):
        check_fits("photo.jpg", (10_000, 10_000), 10, 1)


def test_readable_sizes():
    shown = [readable(size) for size in (0, 999, 53_760_000, 1.3e9, 2.5e15)]
    assert shown == ["0 bytes", "999 bytes", "53.8 MB", "1.3 GB", "2500.0 TB"]


def test_errors_of_one_file_and_faults_of_the_program():
    for build in (lambda: torch.empty(1 << 55), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            build()
        assert "not enough memory" in failure_reason(caught.value)
    assert failure_reason(OSError(28, "No space left on device", "x.png")) == (
        "x.png: No space left on device"
    )
    assert failure_reason(ValueError("two\nlines")) == "two lines"
    assert "out of memory" not in failure_reason(
        torch.OutOfMemoryError("CUDA out of memory. Tried")
    )
    assert failure_reason(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert failure_reason(TypeError("x")) is None
