"""The processes that torchrun started, the device of each, and how they end."""

import ctypes
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist

from antlm.program import clean_exit
from config import UserError, require

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")


def find_device(name: str) -> torch.device:
    """Return the device of this name, or for "auto" the fastest there is.

    Raises UserError where torch finds no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, exists in available.items() if exists)
    require(available[name], f"device = {name!r}, but torch finds none; choose cpu or auto")
    return torch.device(name)


def find_device_for_texts(name: str) -> torch.device:
    """Return find_device(name), made ready for batches of many shapes, which texts have."""
    device = find_device(name)
    if device.type == "cuda":
        # cudnn's attention plans anew for each shape, up to a second
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 faster than in float32.

    A CPU with instructions for it is up to four times as fast; one without is slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def keep_freed_memory():
    """Ask glibc to keep memory that is freed: the next step wants it, and paging it in is slow.

    Worth up to a sixth of a step's time on a CPU.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD = -1
        M_MMAP_MAX = -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def busy_cores(seconds: float = 0.2) -> float:
    """Return how many cores of the machine other programs keep busy; 0 where Linux does not say."""
    if not Path("/proc/stat").exists():
        return 0.0
    before = busy_seconds()
    time.sleep(seconds)
    return (busy_seconds() - before) / seconds


def busy_seconds() -> float:
    """Time that all cores have worked since the machine was started."""
    with open("/proc/stat") as file:
        # cpu user nice system idle ..., in ticks
        _, user, nice, system, *_ = file.readline().split()
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


class Processes:
    """This process among those that torchrun started; alone without torchrun.

    rank, world: the number of this process, and of how many
    device: this process's own
    """

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = find_device(device)
        if self.device.type == "cuda":
            number = int(os.environ.get("LOCAL_RANK", 0))  # among the processes of this machine
            n_gpus = torch.cuda.device_count()
            require(
                number < n_gpus,
                f"process {number + 1} on this machine finds {n_gpus} GPU(s), and each needs its "
                "own; lower --nproc_per_node, or choose --device=cpu",
            )
            self.device = torch.device("cuda", number)
            torch.cuda.set_device(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.world > 1:
            # numbers of the host travel by gloo, so that no step waits for the GPU
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=self.fresh_store(), rank=self.rank, world_size=self.world
            )

    def fresh_store(self) -> dist.Store:
        """Return torchrun's store, under a name that is new at each start.

        Without it a process that torchrun starts again may be told the address of a dead one: its
        store keeps what was written before the failure (torch 2.13).
        """
        store, _, _ = next(dist.rendezvous("env://"))
        name = uuid4().hex
        # Each process asks rank 0 for the name. It asks by a question of its own, since an answer
        # to a known one could be from before the failure, too.
        if self.rank > 0:
            store.set(f"question of {self.rank}", name)
            name = store.get(name).decode()
            store.set(f"{name}: {self.rank} has come", "")
        else:
            for rank in range(1, self.world):
                while not store.check([f"{name}: {rank} has come"]):
                    # the first question may be that of a dead process
                    question = store.get(f"question of {rank}").decode()
                    store.set(question, name)
                    time.sleep(0.01)
        return dist.PrefixStore(name, store)

    def sum(self, numbers: list[float]) -> list[float]:
        """Return each number summed over all processes; they wait for each other."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def wait(self):
        """Wait until all processes have come here."""
        self.sum([0])

    def print(self, *text):
        """Print in the first process only."""
        if self.rank == 0:
            print(*text, flush=True)

    def describe_device(self) -> str:
        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        return f"{self.device} ({torch.get_num_threads()} threads)"


class StopSignals:
    """Remember Ctrl-C and SIGTERM, so that the steps done can be saved."""

    def __init__(self):
        self.received = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received.append(number)
        # A second one ends the process at once; not under torchrun, which repeats what the
        # terminal has sent already.
        if not started_by_torchrun():
            signal.signal(number, signal.SIG_DFL)

    def any(self, processes: Processes) -> bool:
        """Whether any process has been told to stop; all have to ask at the same place."""
        return processes.sum([len(self.received)]) != [0]

    def exit_code(self) -> int:
        """128 plus the signal; another process may have received it."""
        number = self.received[0] if self.received else signal.SIGTERM
        return 128 + number


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch_name() -> str:
    """A name that processes share exactly if the same call of torchrun started them."""
    return f"{os.uname().nodename} {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID')}"


def leave(processes: Processes, code: int):
    """End this process once all have come to their end."""
    if processes.world > 1:
        dist.destroy_process_group()
        # While Python takes itself apart, a thread of torch (2.13) that is still there aborts the
        # process now and then, and torchrun reports a failure of a run that is complete.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


@contextmanager
def full_memory_in_one_line(advice: str):
    """Raise a UserError with this advice where the memory of a GPU or of the machine is full."""
    try:
        yield
    except RuntimeError as error:
        # not torch.OutOfMemoryError alone: the compiler, the driver and a CPU raise others
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
            raise
        raise UserError(f"the device's memory is full; {advice}") from None


@contextmanager
def errors_in_one_line():
    """End train.py as clean_exit does, with a line that says how to go on."""
    # A signal while it starts ends it at once: a process of several may be waiting in C++ for
    # another. Later ones are handled by StopSignals.
    with clean_exit(signals=()):
        try:
            with full_memory_in_one_line("lower --micro_rows, the batch stays the same"):
                yield
            return
        except UserError as error:
            line = str(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            line = f"{error.strerror}; finished checkpoints are whole: fix this, then go on with "
            line += "--resume"
            if error.filename:
                line = f"{error.filename}: {line}"
        except RuntimeError as error:
            if "gloo" not in str(error):
                raise
            line = (
                f"process {os.environ['RANK']}: lost contact with another one; go on from the "
                "newest checkpoint with --resume"
            )
        # torchrun ends all processes once one has failed: the first on each node is to say why
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(10)
        raise UserError(line)
