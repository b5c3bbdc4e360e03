"""The processes of torchrun, and the device of each."""

import ctypes
import os
import time
from uuid import uuid4

import torch
import torch.distributed as dist

from config import UserError


class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self, device: str):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = next(d for d in found if found[d]) if device == "auto" else device
        if not found[device]:
            raise UserError(f"device = {device!r}, but torch finds none; choose cpu or auto")
        self.device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        # A CPU with instructions for it multiplies matrices in bfloat16 up to four times as fast; one without is slower.
        cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
        self.fast_bf16 = any(map(cpu.get, ("avx512_bf16", "amx_bf16"))) or device == "cuda" and torch.cuda.is_bf16_supported(False)
        if device == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            # Memory that glibc gives back, the next step has to page in again: up to a sixth of its time.
            libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        if self.world > 1:  # small host-side numbers travel by gloo, so that no step waits for the GPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=self.fresh_store(),
                                    rank=self.rank, world_size=self.world)

    def fresh_store(self) -> dist.Store:
        """torchrun's store under a name new at each start: after a failure it still holds the addresses of the dead."""
        # Each process asks in a name of its own; the first answers with its own until all have come.
        store, name = next(dist.rendezvous("env://"))[0], uuid4().hex
        if self.rank:
            store.set(f"ask/{self.rank}", name)
            name = store.get(name).decode()
            store.set(f"{name}/{self.rank}", "")
        for rank in range(1, self.world) if self.rank == 0 else ():
            while not store.check([f"{name}/{rank}"]):  # the first to be answered may be dead
                store.set(store.get(f"ask/{rank}").decode(), name)
                time.sleep(0.01)
        return dist.PrefixStore(name, store)

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def say(self, *text):
        if self.rank == 0:
            print(*text, flush=True)


def pick_device(name: str) -> str:
    """The device to score on, set up for rows of many lengths; raises UserError where torch does not find it."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, up to a second, for every new shape
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in found if found[d]) if name == "auto" else name
    if not found[device]:
        raise UserError(f"--device {name}: torch finds none; choose cpu or auto")
    return device
