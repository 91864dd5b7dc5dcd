"""A state's tensors of several ranks (gloo) in files, read by other numbers of ranks."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from streaming import storage
from streaming.errors import CheckpointError, StorageError
from tests.processes import free_ports
from trainer.run import state_files
from trainer.run.state_files import Index, load, load_whole, named_tensors, save

SAVING, LOADING = 2, 3


def made() -> dict[str, Any]:
    """Rows that no number of ranks divides, fewer rows than ranks, none, a number, and what is no tensor."""
    rows = torch.arange(7 * 50_000, dtype=torch.float32).view(7, 50_000)
    weights = {"rows": rows, "row": rows[:1] + 1, "none": rows[:0], "half": rows[:5].bfloat16()}
    return {"state_dict": weights, "optimizer_states": [{"step": torch.tensor(3.0), "lr": 0.5}], "global_step": 3}


def shared(state: Any, ranks: int) -> Any:
    mesh = init_device_mesh("cpu", (ranks,))
    return tree_map_only(Tensor, lambda one: distribute_tensor(one, mesh, [Shard(0)]) if one.dim() else one, state)


def save_part(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=SAVING)
    save(folder, shared(made(), SAVING), lambda index: write_index(folder, index), None, dist.group.WORLD)
    dist.destroy_process_group()


def load_part(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=LOADING)
    wanted = made()
    into = named_tensors(shared(tree_map_only(Tensor, torch.zeros_like, wanted), LOADING))
    with counted() as seen:
        load(folder, read_index(folder), into, None, dist.group.WORLD)
    for name, tensor in named_tensors(wanted).items():
        found = into[name]
        assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, tensor), name
    Path(folder, f"read-{rank}").write_text(str(seen["read"]))
    dist.destroy_process_group()


def write_index(folder: str, index: Index) -> None:
    Path(folder, "index").write_bytes(index.to_bytes())


def read_index(folder: str) -> Index:
    return Index.from_bytes(Path(folder, "index").read_bytes())


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the bytes that are read."""
    seen, reading = Counter[str](), storage.reading

    @contextmanager
    def counting(uri: str, options: Any = None) -> Iterator[Any]:
        with reading(uri, options) as file:

            class Counting:
                seek = file.seek

                @staticmethod
                def read(nbytes: int) -> bytes:
                    seen["read"] += nbytes
                    return file.read(nbytes)

            yield Counting

    state_files.storage.reading = counting  # type: ignore[assignment]
    try:
        yield seen
    finally:
        state_files.storage.reading = reading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("saved"))
    (port,) = free_ports(1)
    mp.spawn(save_part, (port, folder), nprocs=SAVING)
    return folder


def test_other_ranks_load_what_some_have_saved_and_read_it_once_between_them(saved: str) -> None:
    (port,) = free_ports(1)
    mp.spawn(load_part, (port, saved), nprocs=LOADING)
    nbytes = sum(tensor.nbytes for tensor in named_tensors(made()).values())
    read = [int(Path(saved, f"read-{rank}").read_text()) for rank in range(LOADING)]
    assert nbytes <= sum(read) < 1.01 * nbytes
    assert max(read) < 0.5 * nbytes


def test_one_process_loads_the_whole_or_what_it_wants_of_it(saved: str) -> None:
    index, wanted = read_index(saved), made()
    found = load_whole(saved, index, None)
    assert (found["global_step"], found["optimizer_states"][0]["lr"]) == (3, 0.5)
    for name, tensor in named_tensors(wanted).items():
        assert torch.equal(named_tensors(found)[name], tensor), name
        assert named_tensors(found)[name].dtype == tensor.dtype
    with counted() as seen:
        part = load_whole(saved, index, None, lambda name: name == "['state_dict']['row']")
    assert torch.equal(part["state_dict"]["row"], wanted["state_dict"]["row"])
    assert part["state_dict"]["rows"].is_meta
    assert seen["read"] == wanted["state_dict"]["row"].nbytes


def test_what_is_damaged_or_missing_is_refused_with_its_file(tmp_path: Path) -> None:
    folder = str(tmp_path)
    save(folder, made(), lambda index: write_index(folder, index), None)
    index, file = read_index(folder), tmp_path / "state-00000.bin"
    state_files.verify(folder, index, None)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for look in (lambda: state_files.verify(folder, index, None), lambda: load_whole(folder, index, None)):
        with pytest.raises(CheckpointError, match=r"state-00000\.bin, of bytes .* does not match its checksum"):
            look()
    file.write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        state_files.verify(folder, index, None)
    file.unlink()
    with pytest.raises(CheckpointError, match="which is not there"):
        load_whole(folder, index, None)


def test_the_same_state_has_the_same_pieces_and_what_can_not_be_written_is_told_as_it_was(tmp_path: Path) -> None:
    hashes = set[str]()
    for name in ("a", "b"):
        folder = str(tmp_path / name)
        save(folder, made(), lambda index, to=folder: write_index(to, index), None)
        hashes.add(hashlib.sha256((tmp_path / name / "state-00000.bin").read_bytes()).hexdigest())
    assert len(hashes) == 1
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        save(str(tmp_path / "file"), made(), lambda index: None, None)
