"""Whether a model is worth compiling, and whether this machine can compile it."""

import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from antlm.distributed import Processes
from config import require

# On a CPU a build takes 11 to 26 s for each shape of a forward pass, and steps become 2 to 26%
# faster, most of all in narrow models (docs/performance.md). So much training a shape, in seconds,
# wins that back as a rule.
WORTH_A_SHAPE = 250
UNCOMPILED_MFU = 0.6  # share of the speed of large matrix products that training comes to
LEAST_FLOPS = 3e13  # minutes of training on any CPU: too few to measure the machine first


class Choice(NamedTuple):
    """Whether the model is compiled, and why `auto` has picked that; "" where it did not."""

    compiled: bool
    reason: str


def choose(
    setting: str, processes: Processes, flops: float, n_shapes: int, dtype: torch.dtype
) -> Choice:
    """Decide, for all processes alike, whether the model is compiled.

    setting: on, off or auto
    flops: of all training that is left, in all processes; dtype: of its products
    n_shapes: kinds of forward pass, each of which is built once
    Raises UserError where the model should be compiled and cannot be.
    """
    device = processes.device
    if setting == "off":
        return Choice(False, "")
    reason = ""
    if setting == "auto":
        reason = f"auto: on for {device.type}"
        if device.type == "mps":
            return Choice(False, "auto: off for mps")
        if device.type == "cpu":
            needed = WORTH_A_SHAPE * n_shapes
            seconds = uncompiled_seconds(processes, flops, dtype)
            reason = (
                f"auto: about {seconds / 60:.0f} min of training without it, "
                f"worth it from {needed / 60:.0f} min on"
            )
            if seconds < needed:
                return Choice(False, reason)

    # a process that cannot compile decides for all
    problem = missing_for_compile(device)
    if problem is None:
        problem = compile_failure(device)
    n_failing = processes.sum([problem is not None])[0]
    if problem is None and n_failing:
        problem = "a compiler in all processes"
    require(
        setting != "on" or problem is None,
        f"compile = 'on' needs {problem}; install it, or choose off",
    )
    if problem is not None:
        return Choice(False, f"auto: it needs {problem}")
    return Choice(True, reason)


def compile_in_place(model: nn.Module, device: torch.device, n_shapes: int):
    """Have torch.compile build the model at its first steps, once for each of n_shapes.

    torch.compiler.set_stance("force_eager") leaves it uncompiled for a while.
    """
    torch._dynamo.config.recompile_limit = max(8, n_shapes)  # beyond it, torch compiles no more
    # torch would cut a layer in two for DDP, whose exchange begins layer by layer as it is
    torch._dynamo.config.optimize_ddp = False
    # Layers are alike, so that one is built for all of them. In one piece with the embedding, the
    # angles of the rotation are computed anew for each number that turns: a third of a GPU's step.
    parts = [*model.blocks]
    if device.type == "cpu":
        # what Inductor (2.13) draws random numbers with takes longer than it saves elsewhere
        torch._inductor.config.fallback_random = True
    else:
        # on a GPU the loss would wait for memory between its products
        parts += [model.head, model.loss]
    for part in parts:
        part.compile(dynamic=False)


def uncompiled_seconds(processes: Processes, flops: float, dtype: torch.dtype) -> float:
    """Predict how long training takes uncompiled, the same in all processes."""
    if flops < LEAST_FLOPS:
        return 0.0
    speeds = processes.sum([product_speed(processes.device, dtype)])[0]
    return flops / (UNCOMPILED_MFU * speeds)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of matrix products, 1,024 numbers a side, the best of ten."""
    n = 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds)


def compile_failure(device: torch.device) -> str | None:
    """Compile a small function, and say in one line what fails; None if nothing does."""
    # slow to import, and most runs on a CPU do not compile
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.utils import fresh_cache

    function = torch.compile(torch.nn.functional.silu, dynamic=False)
    try:
        with fresh_cache():  # or what an earlier call has built would be taken
            function(torch.ones(64, device=device))
    except TorchDynamoException as error:
        first_line = str(error).splitlines()[0]
        return f"a compiler that works ({first_line})"
    return None


def find_compiler(device: torch.device) -> str | None:
    """Return the path of the compiler that torch.compile calls, None where there is none.

    On a CPU the C++ compiler of cpp.cxx in torch/_inductor/config.py (torch 2.13), on CUDA the C
    compiler of triton/runtime/build.py.
    """
    if device.type == "cuda":
        names = ["gcc", "clang"]
        variable = "CC"
    else:
        names = ["clang++" if sys.platform == "darwin" else "g++"]
        variable = "CXX"
    # the variable replaces the others, also where it names nothing
    if variable in os.environ:
        names = [os.environ[variable]]
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    return None


def missing_for_compile(device: torch.device) -> str | None:
    """Name what torch.compile needs and this machine lacks; None where it has all."""
    if find_compiler(device) is None:
        if device.type == "cuda":
            return "a C compiler (gcc, clang, or the one that CC names)"
        return "a C++ compiler (g++, or the one that CXX names)"

    # what it compiles are modules of Python: where compilers look for its headers
    folders = [sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")]
    for variable in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        folders += os.environ.get(variable, "").split(os.pathsep)
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        return "the headers of Python (Python.h, in python3-dev or python3-devel)"
    return None
