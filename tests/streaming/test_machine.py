"""What a process may use of its machine, and how a Ray is started or reached that can't be."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from streaming import cluster, machine
from streaming.errors import ConfigError, NodeError


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SLURM_") or name in ("RAY_TMPDIR", "RAY_ADDRESS"):
            monkeypatch.delenv(name)


def test_the_smallest_of_machine_affinity_and_slurm_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(machine, "_cgroups", lambda _: iter(()))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    assert machine.cpus() == (128, "the machine")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5})
    assert machine.cpus() == (3, "the affinity")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert machine.cpus() == (2, "SLURM_CPUS_ON_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    assert machine.memory() == (2**30, "SLURM")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert machine.memory() == (2**31, "SLURM")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the node
    monkeypatch.delenv("SLURM_MEM_PER_CPU")
    assert machine.memory().by == "the machine"


def test_this_process_s_affinity_is_what_the_kernel_tells() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cpus().amount == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("files", "cpus", "nbytes"),
    [
        ({"a/b/cpu.max": "150000 100000", "a/memory.max": "1073741824", "a/b/memory.max": "max"}, 2, 2**30),
        ({"a/b/cpu.max": "max 100000", "cpu.max": "5000 100000", "memory.max": "4096"}, 1, 4096),
        ({"a/cpu.cfs_quota_us": "100000", "a/cpu.cfs_period_us": "50000", "a/memory.limit_in_bytes": "8192"}, 2, 8192),
        ({"a/cpu.cfs_quota_us": "-1", "a/cpu.cfs_period_us": "50000", "memory.limit_in_bytes": f"{2**63}"}, 64, None),
        ({}, 64, None),
    ],
)
def test_limits_of_the_own_cgroup_and_of_those_above_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cpus: int, nbytes: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(machine, "_cgroups", lambda _: (tmp_path / group for group in ("a/b", "a", ".")))
    assert machine.cpus().amount == cpus
    assert machine.memory().by == ("the machine" if nbytes is None else "the cgroup")
    assert nbytes is None or machine.memory().amount == nbytes


def test_a_folder_whose_name_leaves_no_room_for_sockets_has_a_short_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("job" * 30)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(machine, "_SHORT_FOLDERS", ("/proc", "/tmp"))
    short = machine.short_temporary_folder()
    assert os.path.realpath(short) == str(long)  # it is made if it is not there
    assert machine.short_temporary_folder() == short
    name = f"{short}/ray/session_2026-11-29_04-15-00_123456_{2**22}/sockets/plasma_store.1"
    with socket.socket(socket.AF_UNIX) as server:
        os.makedirs(os.path.dirname(name))
        server.bind(name)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert machine.short_temporary_folder() == "/tmp"
    monkeypatch.setenv("RAY_TMPDIR", "/proc/no")
    with pytest.raises(NodeError, match=r"/proc/no: .*; let RAY_TMPDIR or TMPDIR name a folder"):
        machine.short_temporary_folder()
    # Links whose folders are gone go, too; one that somebody else made is not followed.
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("other" * 20)))
    long.rename(tmp_path / "gone")
    machine.short_temporary_folder()
    assert not os.path.lexists(short)
    os.symlink(tmp_path, short)
    (tmp_path / "gone").rename(long)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert os.path.realpath(machine.short_temporary_folder()) == str(long)
    monkeypatch.setattr(machine, "_SHORT_FOLDERS", ("/proc",))
    with pytest.raises(NodeError, match="too long for Ray's sockets"):
        machine.short_temporary_folder()


def test_a_home_is_one_that_can_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.has_home()
    for home in ("/proc", str(tmp_path / "none")):
        monkeypatch.setenv("HOME", home)
        assert not machine.has_home()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    assert not machine.has_home()


@pytest.fixture
def listening() -> Iterator[list[bytes]]:
    """A server that is no Ray's: what it answers, and its port behind it."""
    answers = [b""]
    with socket.create_server(("", 0)) as server:
        answers.append(str(server.getsockname()[1]).encode())

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(answers[0])

        threading.Thread(target=serve, daemon=True).start()
        yield answers


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("nonsense", "it is the HOST:PORT of a cluster"),
        ("http://127.0.0.1:8265", "is where `ray job submit` sends jobs"),
        ("127.0.0.1:1", r"no Ray answers there \(Connection refused\); is the cluster up\?"),
        ("ray://127.0.0.1:1", r"no Ray answers there \(Connection refused\)"),
    ],
)
def test_an_address_at_which_no_ray_answers_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str, told: str
) -> None:
    monkeypatch.setattr(cluster, "_ANSWERS_S", 0.1)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test may have a Ray
    with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS={address}: .*{told}"):
        cluster.connect(1)


def test_another_program_at_a_ray_s_address_is_told(monkeypatch: pytest.MonkeyPatch, listening: list[bytes]) -> None:
    monkeypatch.setattr(cluster, "_ANSWERS_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening[1].decode()}")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b""):
        listening[0] = answer
        with pytest.raises(ConfigError, match=r"no Ray answers there \(another program does\)"):
            cluster.connect(1)
    listening[0] = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    cluster.check_address(f"127.0.0.1:{listening[1].decode()}")


def test_a_silent_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ANSWERS_S", 0.2)
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(ConfigError, match=r"no Ray answers there \(timed out\)"),
    ):
        cluster.check_address(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0"),
            "take the cluster's versions",
        ),
        (PermissionError(13, "Permission denied", "/tmp/ray"), "let RAY_TMPDIR name a folder of your own"),
        (OSError(28, "No space left on device"), "make room"),
        (ConnectionError(), "do this"),
    ],
)
def test_whatever_ray_raises_while_it_starts_is_one_line_with_a_remedy(error: Exception, remedy: str) -> None:
    with pytest.raises(NodeError, match=f"^here: .*; .*{remedy}") as caught, cluster._one_line("here", "do this"):
        raise error
    assert "\n" not in str(caught.value)


def test_local_is_no_cluster_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster.address() is None
