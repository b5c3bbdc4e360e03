"""Whether a model is worth compiling, and whether this machine can compile it."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch


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
