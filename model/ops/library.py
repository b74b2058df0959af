"""The compiled operators: found, loaded once, described. The only place that loads the library."""

# torch's `load_library` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import ctypes
import functools
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

LIBRARY_NAME = "librefinedet.so"
CARRIED = "operators"
"""directory beside the package `refinedet` in which a submitted job carries the library of the machine it came from"""
VERSION = "2"
"""of the operators, as csrc/schemas.cpp has it"""
BUILD_COMMAND = "uv pip install --no-build-isolation --no-deps -e ."


@dataclass(frozen=True)
class LibraryStatus:
    """State of the compiled operators.

    loaded         the library is loaded and its CPU kernels can be used
    path           of the library; None where it is not built
    cuda           it holds CUDA kernels, and this torch can run them
    architectures  compute capabilities the CUDA kernels are built for, such as "80-real"; empty without CUDA
    compilers      that built it
    oldest_torch   the stable ABI it is built on, as the oldest torch that can load it
    reason         one sentence: what is loaded, or why nothing is and the remedy
    """

    loaded: bool
    path: Path | None = None
    cuda: bool = False
    architectures: tuple[str, ...] = ()
    compilers: tuple[str, ...] = ()
    oldest_torch: str = ""
    reason: str = ""


_loaded_here: list[Path] = []
"""the library, once this copy of the package has registered its operators"""


@functools.cache
def describe_library() -> LibraryStatus:
    """Load the library where it is built, and describe it; never raises.

    A process can register the operators once. A second copy of this package, such as a packaged model of other code,
    does not use the first one's operators, whose contract may differ: it runs the reference, for that reason.
    """
    import torch  # not before: to submit a job only `find` is needed

    if hasattr(torch.ops.refinedet, "align_conv") and not _loaded_here:
        reason = "The operators belong to another copy of this package in this process; load one model a process."
        return LibraryStatus(loaded=False, reason=reason)

    path = find()
    if path is None:
        reason = f"The operators are not built ({LIBRARY_NAME} is in none of the places of refinedet.model.ops); "
        return LibraryStatus(loaded=False, reason=f"{reason}build them with `{BUILD_COMMAND}`.")
    try:
        torch.ops.load_library(path)
        _loaded_here.append(path)
        build_info = ctypes.CDLL(str(path)).refinedet_build_info
        build_info.restype = ctypes.c_char_p
        cuda, compiler, oldest_torch, *version = build_info().decode().split("|")
    except (OSError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"The operators at {path} cannot be loaded on torch {torch.__version__} ({error}); "
        return LibraryStatus(loaded=False, path=path, reason=f"{reason}rebuild them with `{BUILD_COMMAND}`.")
    if version != [VERSION]:
        reason = f"The operators at {path} were built from another version of the sources; "
        return LibraryStatus(loaded=False, path=path, reason=f"{reason}rebuild them with `{BUILD_COMMAND}`.")
    nvcc, _, architectures = cuda.partition(":")
    reason = "The operators are built for the CPU"
    if nvcc:
        reason += f" and, with CUDA {nvcc}, for {architectures}"
        if torch.version.cuda is None:
            reason += ", which this CPU build of torch cannot use"
    return LibraryStatus(
        loaded=True,
        path=path,
        cuda=bool(nvcc) and torch.version.cuda is not None,
        architectures=tuple(architectures.split(",")) if nvcc else (),
        compilers=(compiler, f"nvcc {nvcc}") if nvcc else (compiler,),
        oldest_torch=oldest_torch,
        reason=reason + ".",
    )


def find() -> Path | None:
    """The library, whether this torch can load it or not; None where it is not built."""
    return next((path for path in _places() if path.is_file()), None)


def _places() -> list[Path]:
    """Possible paths of the library, best first.

    An editable install puts it into site-packages, not beside this file. The code of a job that was submitted to a
    cluster lies in a directory of its own: there, the library that the node's image was built with, for its GPUs, comes
    before the one that travelled.
    """
    own = [Path(__file__).parent]
    installed = [Path(place) / "refinedet" / "model" / "ops" for place in sys.path]
    carried = [place.parents[2] / CARRIED for place in own]
    return [place / LIBRARY_NAME for place in (*own, *installed, *carried)]


@functools.cache
def is_loaded() -> bool:
    """Return whether the compiled operators can be used; warn once where they cannot."""
    status = describe_library()
    if not status.loaded:
        logger.warning("%s The slower PyTorch reference runs instead.", status.reason)
    return status.loaded


@functools.cache
def runs_on_gpu(index: int) -> bool:
    """Return whether the CUDA kernels run on this GPU; warn once where they do not."""
    fault = describe_fault_on_gpu(index)
    if fault:
        logger.warning("%s Until then the slower PyTorch reference runs.", fault)
    return not fault


def describe_fault_on_gpu(index: int) -> str:
    """One sentence: why the CUDA kernels do not run on this GPU, and the remedy; empty where they do."""
    import torch

    status = describe_library()
    if not status.cuda:
        return (
            f"GPU {index} has no kernels: {status.reason} Build them where nvcc is found with `{BUILD_COMMAND}`, or "
            "set head: vanilla."
        )
    needed, found = lowest_capability(status.architectures), torch.cuda.get_device_capability(index)
    if found >= needed:
        return ""
    return (
        f"GPU {index} has compute capability {found[0]}.{found[1]}, the operators are for {needed[0]}.{needed[1]} and "
        f"later; rebuild them for it with `CUDAARCHS={found[0]}{found[1]} {BUILD_COMMAND}`, or set head: vanilla."
    )


def lowest_capability(architectures: Sequence[str]) -> tuple[int, int]:
    """(major, minor) of the lowest of CMake's names, such as "80-real" or "90a"; (0, 0) where none has a number."""
    numbers = [int(number[0]) for name in architectures if (number := re.match(r"\d+", name))]
    major, minor = divmod(min(numbers, default=0), 10)
    return major, minor
