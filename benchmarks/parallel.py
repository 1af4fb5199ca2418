"""What ranks of one host pay to exchange arrays: shared memory against gloo, in turns, two ranks on two cores.

scripts/bench parallel
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = [256, 4096, 65_536, 1 << 20, 16 << 20]  # bytes
TURNS = 7
RANKS = 2


def calls_of(num_bytes: int) -> int:
    """Calls a turn: enough for a median, bounded in bytes."""
    return max(3, min(300, (8 << 20) // num_bytes))


def time_of(call, count: int) -> list[float]:
    found = []
    for _ in range(count):
        start_s = time.perf_counter()
        call()
        found.append(time.perf_counter() - start_s)
    return found


def measure(rank: int, folder: Path) -> None:
    """One rank: every exchange over both transports, turn by turn; rank 0 prints."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from fanfold.parallel.shared import SharedGroup

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=rank, world_size=RANKS)
    with SharedGroup((folder / "path").read_text(), rank, RANKS) as group:
        for num_bytes in SIZES:
            array, tensor = np.zeros(num_bytes // 4, np.float32), torch.zeros(num_bytes // 4)
            parts = [torch.empty_like(tensor) for _ in range(RANKS)]

            def shared_trip(array=array):
                if rank == 0:
                    group.send(array, 1, "there")
                    group.recv(1, "back")
                else:
                    group.send(group.recv(0, "there"), 0, "back")

            def gloo_trip(tensor=tensor):
                if rank == 0:
                    dist.send(tensor, 1)
                    dist.recv(tensor, 1)
                else:
                    dist.recv(tensor, 0)
                    dist.send(tensor, 0)

            compare(
                f"all_reduce {num_bytes:>9,} B",
                lambda array=array: group.all_reduce(array, "layers.7.mlp.down"),
                lambda tensor=tensor: dist.all_reduce(tensor),
                calls_of(num_bytes),
            )
            compare(
                f"all_gather {num_bytes:>9,} B",
                lambda array=array: group.all_gather(array, "layers.7.attention"),
                lambda parts=parts, tensor=tensor: dist.all_gather(parts, tensor),
                calls_of(num_bytes),
            )
            compare(f"there and back {num_bytes:>9,} B", shared_trip, gloo_trip, calls_of(num_bytes))
    dist.destroy_process_group()


def compare(what: str, shared, gloo, count: int) -> None:
    """Turns of both, one after the other; median of all calls, and the best turn's."""
    import torch.distributed as dist

    found: dict[str, list[list[float]]] = {"shared": [], "gloo": []}
    for _ in range(TURNS):
        for name, call in (("shared", shared), ("gloo", gloo)):
            dist.barrier()
            found[name].append(time_of(call, count))
    if dist.get_rank() == 0:
        middle = {name: statistics.median(itertools.chain(*turns)) * 1e6 for name, turns in found.items()}
        best = {name: min(map(statistics.median, turns)) * 1e6 for name, turns in found.items()}
        print(
            f"{what:>27}: shared memory {middle['shared']:8.1f} us (best turn {best['shared']:8.1f}), "
            f"gloo {middle['gloo']:8.1f} us (best turn {best['gloo']:8.1f}), "
            f"{middle['gloo'] / middle['shared']:5.1f} x",
            flush=True,
        )


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] == "--rank":
        measure(int(sys.argv[2]), Path(sys.argv[3]))
        return 0
    from fanfold.engine.supervisor import child_environment
    from fanfold.parallel.shared_file import new_path

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "path").write_text(new_path())
        environment = {**child_environment(threads=1), "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, __file__, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank), folder], env=environment) for rank in range(RANKS)]
        return max(process.wait() for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
