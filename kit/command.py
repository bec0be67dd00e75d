"""A command of this folder: the types of its arguments, its process among others, the sentence it ends with.

Under torchrun a process takes its place from the environment; without, it is number 0 of 1.
"""
import argparse
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

try:
    import resource         # not on Windows
except ImportError:
    resource = None

NO_MEMORY = "out of memory|allocate memory|not enough memory"       # as PyTorch says it on a GPU, Linux, Windows


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a ValueError, which `run_command` turns into the command's one sentence."""

    def error(self, message):
        raise ValueError(message)


def whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or not least <= int(text) < 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


positive = partial(whole, least=1)


def clip_frames(text: str) -> int:
    if not text.isdecimal() or int(text) % 4 != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 4k+1: give 1, 5, 9, ... frames")
    return positive(text)


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from low to high."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or not math.isfinite(value):
            wanted = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {wanted}")
        return value
    return parse


def pixels(text: str) -> tuple[int, int]:
    """"832x480", width x height, or "64", one side of a square -> (w, h)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) and int(side) % 16 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 832x480, or one side: multiples of 16")
    return int(sides[0]), int(sides[-1])


def file_and_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE -> (FILE, SCALE or 1)."""
    file, _, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if file else (text, 1.0)
    except ValueError:
        return text, 1.0


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {device} is not to be had here; try cpu") from None


def start_process_group(device: str | None = None) -> tuple[int, int, str | None]:
    """Rank, number of processes and own device, as torchrun's environment says; (0, 1, None) without it. A GPU each and
    NCCL, or gloo where there is none or `device` is cpu. ValueError: too few GPUs."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, None
    cuda, local = torch.cuda.is_available() and device != "cpu", int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"there are {torch.cuda.device_count()} GPUs; give torchrun at most as many processes")
    device = f"cuda:{local}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))     # one may prepare for hours
    return dist.get_rank(), dist.get_world_size(), device


def end_process_group() -> None:
    """All wait for each other, then part: one that left early would cut off what another still reads."""
    if processes() > 1:
        dist.barrier()
        dist.destroy_process_group()


def ranks() -> tuple[int, int]:
    """This process's number and how many torchrun started; (0, 1) without it."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def processes() -> int:
    return ranks()[1]


def is_first() -> bool:
    return ranks()[0] == 0


def from_first(make: Callable):
    """What make() returns in the first process, in all of them."""
    box = [make() if is_first() else None]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def average(tensors: list[Tensor]) -> None:
    """Each tensor becomes its mean over all processes, in place: one message for all."""
    if processes() > 1:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, mean in zip(tensors, (together / processes()).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


def free_memory(device) -> int:
    """Bytes that are free now on a GPU, or that the system says a program can take from the host."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return kernel_says("/proc/meminfo", "MemAvailable") or sys.maxsize      # unknown: taken as enough


def choose_threads(*models: torch.nn.Module) -> None:
    """On the CPU a small model gets few threads, one for each 20 million parameters: more win little alone, and beside
    other work they wait for each other (a clip of tiny/ took 5 s with one and 22 to 33 s with two). OMP_NUM_THREADS
    goes before."""
    if "OMP_NUM_THREADS" not in os.environ:
        parameters = sum(p.numel() for model in models for p in model.parameters())
        torch.set_num_threads(max(1, min(torch.get_num_threads(), parameters // 20_000_000)))


def kernel_says(file: str, field: str) -> int | None:
    """A field, in bytes, of a file such as /proc/self/status; None where there is none, outside Linux."""
    try:
        return 1024 * int(re.search(rf"^{field}:\s+(\d+)", Path(file).read_text(), re.M)[1])
    except (OSError, TypeError):
        return None


def peak_memory(device="cpu") -> int:
    """Bytes at the peak: of the GPU, or of this process's host memory; 0 where nobody knows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    elsewhere = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0      # bytes on macOS
    return kernel_says("/proc/self/status", "VmHWM") or elsewhere


def forget_peaks(device) -> None:
    """Peaks are counted anew from here, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def measured(stages: dict, name: str, device="cpu") -> Iterator[dict]:
    """Notes in stages[name] what the block took: seconds, and at its peak host_mib and, on a GPU, device_mib."""
    forget_peaks(device)
    start = time.perf_counter()
    stages[name] = stage = {}
    yield stage
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        stage["device_mib"] = peak_memory(device) // 2 ** 20
    stage |= dict(seconds=round(time.perf_counter() - start, 2), host_mib=peak_memory() // 2 ** 20)


def end_at_second_signal() -> int:
    """From now on the second SIGINT or SIGTERM ends the process at once, in the middle of a long operation, too: a
    thread hears of it through a pipe. Returns the pipe's end, to be closed when this is over."""
    hears, tells = os.pipe()
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)

    def listen():
        count = 0
        while said := os.read(hears, 64):
            count += sum(number in (signal.SIGINT, signal.SIGTERM) for number in said)
            if count > 1:
                os._exit(130)
        os.close(hears)
    threading.Thread(target=listen, daemon=True).start()
    return tells


def run_command(main: Callable, name: str, room: str = "a smaller batch, --accumulate, --checkpoint") -> int:
    """The exit code of main(). Wrong input from outside (ValueError, OSError), too little memory and the end of
    another process are one sentence on stderr and 2; Ctrl-C and SIGTERM 130. Any other error keeps its traceback. A
    warning is one line.

    room: what to try when memory was short."""
    before, written = signal.signal(signal.SIGTERM, signal.default_int_handler), warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{name}: {message}\n"
    try:
        main()
        return 0
    except KeyboardInterrupt:
        said, code = "stopped", 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said, code = " ".join(str(error).split()), 2
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(NO_MEMORY, said):
            said = f"not enough memory: try {room}"
        elif isinstance(error, RuntimeError):
            if processes() == 1 or "peer" not in said:
                raise
            said = "another process ended, its message says why"
    finally:
        signal.signal(signal.SIGTERM, before)
        warnings.formatwarning = written
    print(f"{name}: {said}", file=sys.stderr)
    return code
