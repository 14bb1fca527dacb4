"""How the processes of a run find one another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from gan.distributed import Ranks, first_line, ranks

_PATIENCE = timedelta(minutes=30)  # for the others, who may be reading a cold disk


@contextlib.contextmanager
def started() -> Iterator[Ranks]:
    """Join the processes that torchrun has started, for the length of a block; without torchrun, a run of one.

    Raises:
        OSError: they do not come together.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield ranks()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    backend, size = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", int(os.environ["WORLD_SIZE"])
    try:
        store = _store_of_this_start()
        own = {} if store is None else {"store": store, "rank": int(os.environ["RANK"]), "world_size": size}
        dist.init_process_group(backend, timeout=_PATIENCE, **own)
    except (dist.DistError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise OSError(f"the ranks cannot meet at {place} (MASTER_ADDR:MASTER_PORT): {first_line(error)}") from error
    failed = False
    try:
        yield ranks()
    except Exception:
        failed = True  # which is said before the others, and with them torchrun, learn that this process has gone
        raise
    finally:
        if not failed:
            dist.destroy_process_group()


def _store_of_this_start() -> dist.Store | None:
    """torchrun's store outlives the processes that it starts again: their addresses would be taken for those of the new
    ones, which then wait for them (pytorch/pytorch#135712). None where torchrun makes a store for each start.

    Raises:
        OSError: several nodes share such a store, and do not count their starts alike.
    """
    named = os.environ.get
    if named("TORCHELASTIC_USE_AGENT_STORE") != "True" or named("TORCHELASTIC_MAX_RESTARTS") == "0":
        return None
    if named("GROUP_WORLD_SIZE") != "1":
        raise OSError(
            "torchrun --max-restarts on several nodes must run with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment: without it, processes that start again wait for those that have ended (pytorch#135712)"
        )
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=_PATIENCE)
    return dist.PrefixStore(f"start {named('TORCHELASTIC_RESTART_COUNT')}", store)
