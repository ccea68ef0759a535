"""What ranks tell each other outside of collectives: through the store of the default process group."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def default() -> dist.Store:
    """The default process group's store; what it held outlives a broken group."""
    return dist.distributed_c10d._get_default_store()


def private(process_group: dist.ProcessGroup) -> dist.Store:
    """A corner of the default store for one wrapper of a process group; every member must ask for it.

    A rank's n-th wrapper of the group meets the others' n-th: what an earlier one left behind is not read again.
    """
    store = dist.PrefixStore(f"tp_attention/group {process_group.group_name}", default())
    turn = store.add(f"turns/{dist.get_rank(process_group)}", 1)
    return dist.PrefixStore(str(turn), store)


def exchange(store: dist.Store, key: str, value: bytes, rank: int, size: int, timeout: float) -> list[bytes]:
    """Every rank's value under a key that is used once. Raises TimeoutError naming the ranks that did not come."""
    store = dist.PrefixStore(key, store)
    keys = [str(r) for r in range(size)]
    store.set(keys[rank], value)  # type: ignore[arg-type]  # the stub forgets bytes
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        missing = [r for r in range(size) if not store.check([keys[r]])]
        raise TimeoutError(f"ranks {missing} of {size} did not come to {key} within {timeout:g} s") from error
    return [store.get(k) for k in keys]
