"""How a command starts and ends, under any number of ranks, where its output goes, and the device in use.

    torchrun --standalone --nproc_per_node=2 generate.py --compile --checkpoint_path checkpoints/NAME/model.pth

Decisions to know:

- `run_command` is the end of every command: exit code 2 and one sentence for what the user can change, 1 for a
  computation that failed, and a traceback for a fault of the program alone.
- torchrun ends all ranks when one has ended. Rank 0 prints, errors first.
- A file is written beside its name and renamed into place. A FIFO or a device is written to.

Copy me: needs torch.
"""

import argparse
import gc
import json
import logging
import math
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# --- Ranks ------------------------------------------------------------------------------------------------------------


def rank_and_count() -> tuple[int, int]:
    """(this process's rank, number of ranks); (0, 1) if torchrun has not started it."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def print0(*words, **options) -> None:
    """`print` on rank 0."""
    if rank_and_count()[0] == 0:
        print(*words, **options)


def say(*words):
    print0(*words, file=sys.stderr, flush=True)


def own_device(device: str) -> str:
    """The device of this rank: of "cuda" the GPU with the local rank's number. Raises ValueError if it has none."""
    if rank_and_count()[1] == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise ValueError(
            f"under torchrun every rank takes a device of its own; give --device cuda or cpu, not {device}"
        )
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} has no GPU, there are {torch.cuda.device_count()}; start fewer ranks")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


def objects_of_ranks(value) -> list:
    """[rank 0's value, rank 1's, ...], small Python objects, on every rank."""
    values = [None] * rank_and_count()[1]
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def check_agreement(settings: dict) -> None:
    """Raises ValueError if a rank has other settings than rank 0, and names the first one."""
    first, *others = objects_of_ranks({name: repr(value) for name, value in settings.items()})
    for rank, theirs in enumerate(others, start=1):
        for name, ours in first.items():
            if theirs[name] == ours:
                continue
            short = len(ours + theirs[name]) < 100
            values = f"{name} {theirs[name]}, where rank 0 has {ours}" if short else f"another {name} than rank 0"
            raise ValueError(f"rank {rank} has {values}; give every rank the same command and the same files")


# --- A command --------------------------------------------------------------------------------------------------------


def run_command(main, arguments, splits: bool = False) -> None:
    """Exit with what `main`, given a command's arguments, returns, or after an error with the code of `explain`.

    With `splits` the command works under torchrun: this starts the group of all ranks, checks that their arguments are
    the same, and gives each its own device. torchrun ends the others when one rank has ended: rank 0 prints an error
    first, so that it is there once, but waits with one that it may only have because another rank is gone.
    """
    (rank, ranks), finished = rank_and_count() if splits else (0, 1), False
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed; print() would take stdout for a stderr of None
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal in latin-1 shows ? for what it does not have
    for remark in ("\\s*Online softmax", "TensorFloat32 tensor cores"):  # of the compiler; nobody can act on them
        warnings.filterwarnings("ignore", message=remark)
    try:
        if ranks > 1:
            own = argparse.Namespace(**vars(arguments) | {"device": own_device(arguments.device)})
            _start(own.device)
            check_agreement(vars(arguments))
            arguments = own
        code = int(main(arguments) or 0)
        sys.stdout.flush()
        finished = True
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code, sentence = explain(error)
        if sentence is None and ranks == 1:
            raise
        if rank > 0:
            time.sleep(2)
        if sentence is None:
            time.sleep(0 if rank else 5)
            traceback.print_exc()
        elif sentence:
            print(f"error: {f'rank {rank}: ' if rank else ''}{sentence}", file=sys.stderr)
    if ranks == 1:
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if finished:  # else others may never come to this, and the end of the process takes the group along
        threading.Timer(10, os._exit, [code]).start()
        gc.collect()  # NCCL waits for CUDA graphs that hold its kernels (pytorch issue 115388), until all are freed
        dist.destroy_process_group()
    os._exit(code)  # torch 2.13 at times aborts while Python ends (1 of 16 runs over gloo)


def output_has_ended() -> bool:
    """Whether nobody reads the pipe that stdout or stderr goes to, as after `| head`. What comes for it is dropped."""
    pipes = select.poll()
    for number in (1, 2):
        pipes.register(number, 0)
    ended = [number for number, event in pipes.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for number in ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(ended)


def explain(error: Exception) -> tuple[int, str | None]:
    """(exit code, sentence for the user) of what ended a command; the sentence is None for a fault of the program.

    2 is for what the user can change, 1 for a computation that failed. 141, without a sentence, is what a shell says of
    a program whose output nobody reads.
    """
    if isinstance(error, BrokenPipeError) and output_has_ended():
        return 141, ""
    if isinstance(error, FloatingPointError):
        return 1, str(error)
    message = str(error)
    inner = getattr(error, "inner_exception", None)  # of the compiler's errors
    no_memory = "can't allocate memory" in message or "out of memory" in message.lower()
    if no_memory or isinstance(inner or error, (torch.OutOfMemoryError, MemoryError)):
        tried = re.search(r"ried to allocate ([\d.]+ \w+)", message)
        asked = f" for {tried[1]} more" if tried else ""
        advice = "a smaller --batch_size or --length, fewer slots, --quantize, or a smaller model"
        return 2, f"there is not enough memory on this device{asked}; take {advice}"
    if "No working C++ compiler" in message or "Failed to find C compiler" in message:
        return 2, "--compile needs a C++ compiler, and none is on the PATH; install g++ or leave out --compile"
    if "Python.h: No such file" in message:
        return 2, "--compile needs Python.h, which is missing; install python3-dev or leave out --compile"
    if "BF16 is not supported" in message:
        return 2, "--compile takes no bfloat16 on this GPU; give --precision float16 or float32, or leave out --compile"
    if isinstance(inner, OSError):
        return 2, f"--compile could not write or run what it needs: {inner}; mend that or leave out --compile"
    if isinstance(error, (ValueError, OSError)):
        return 2, message
    return 1, None


def _start(device: str) -> None:
    if rank_and_count()[0] > 0:  # what is worth saying, rank 0 says
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C at once, even while this rank waits for another
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    # A prompt may be long in coming, and torchrun sees a rank that ends: no other timeout is needed.
    dist.init_process_group(backend, timeout=timedelta(days=1))


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0 and below 2**31")
    return int(text)


def seed_number(text: str) -> int:
    """A seed, so that as many rows and answers as anybody makes can count on from it in 64 bits."""
    if not text.removeprefix("-").isdecimal() or not -(2**63) <= int(text[:30]) < 2**64 - 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from -2**63 to 2**64 - 2**32")
    return int(text)


# --- Files ------------------------------------------------------------------------------------------------------------


def read_text(file: Path, newline: str | None = None) -> str:
    """A text without its byte order mark; line ends become \\n, or stay with the newline "".

    Raises ValueError if it is not UTF-8.
    """
    try:
        with open(file, encoding="utf-8-sig", newline=newline) as text:
            return text.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); save it in UTF-8") from error


def _is_special(path) -> bool:
    """Whether bytes are sent to this path, not a file put in its place: a FIFO, a device, an open stream's name."""
    streams = ("/dev/std", "/dev/fd/", "/proc/")
    return os.path.abspath(path).startswith(streams) or (os.path.exists(path) and not os.path.isfile(path))


def check_target(path, *others) -> None:
    """Raises OSError if no file can be written at `path`, and ValueError if the command also reads or writes it as one
    of `others`, each a path or None. A command asks before its work, not after it."""
    special, target = _is_special(path), Path(os.path.realpath(path))  # resolve() fails at a link to itself
    if not special and str(target) in map(os.path.realpath, filter(None, others)):
        raise ValueError(f"{path} would be written over, but this command needs it too; give another place")
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    place = Path(path) if special else next(parent for parent in target.parents if parent.exists())
    if not os.access(place, os.W_OK) or not special and (target.is_symlink() or not place.is_dir()):
        raise PermissionError(f"{path} cannot be written, because {place} does not allow it; give another place")


@contextmanager
def sigterm_ends():
    """SIGTERM, as `timeout` sends it, raises SystemExit in this block, so that what is half-written goes."""

    def end(*_):
        raise SystemExit(128 + signal.SIGTERM)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def written_in_place(path):
    """A temporary path beside `path`; renamed to it if the block ends well, deleted if not.

    A symlink stays and its target is new. A FIFO or a device gets the bytes, when they are all there. What torch's zip
    writer says of a full disk becomes an OSError.
    """
    special, target = _is_special(path), Path(os.path.realpath(path))
    if not special:
        target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.gettempdir()) if special else target.parent
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        with sigterm_ends():
            yield temporary
            if special:
                with open(temporary, "rb") as source, open(path, "ab") as sink:  # stdout may be a file with text in it
                    shutil.copyfileobj(source, sink)
            else:
                os.replace(temporary, target)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        if isinstance(error.__context__, (KeyboardInterrupt, SystemExit)):  # the zip writer's own error hides it
            raise error.__context__ from None
        raise OSError(f"{path} could not be written whole; is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content) -> None:
    """Write dicts, lists, numbers and text as JSON; a number that is not finite, which JSON lacks, becomes null."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with written_in_place(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1, default=str, allow_nan=False))


# --- The device -------------------------------------------------------------------------------------------------------


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises ValueError if this machine has no such device."""
    try:
        torch.empty(1, device=device).item()  # of "meta" there is nothing to read
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise ValueError(f"there is no device {device!r} on this machine; the default is {default_device()}") from error


def synchronize(device: str) -> None:
    """Wait until this device has done all that was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)  # of cuda:1, too
    elif device != "cpu":
        torch.get_device_module(device).synchronize()


def read_bandwidth(device: str) -> float:
    """Bytes per second at which this device reads its memory: the best of some sums over 256 MB, on a GPU 4 GB."""
    on_gpu = device.startswith("cuda")
    data = torch.ones(min(2**30, torch.cuda.mem_get_info(device)[0] // 8) if on_gpu else 2**26, device=device)
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    size = data.nbytes
    if on_gpu:  # none of this belongs to the model's peak
        del data
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return size / min(seconds)


def peak_memory(device: str) -> int:
    """Bytes: of the allocator on an NVIDIA GPU, of this process on a CPU; on Apple's what is allocated now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # not on Windows

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024


class Stopwatch:
    """The seconds that calls of functions take on a device, whether the host waits for them or not."""

    def __init__(self, device: str):
        self.device, self.spans = device, {}

    def mark(self):
        if self.device.startswith("cuda"):
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()

    def watch(self, name: str, function):
        """The same function; each call's time counts for `name`."""

        def watched(*args, **kwargs):
            start = self.mark()
            result = function(*args, **kwargs)
            self.spans.setdefault(name, []).append((start, self.mark()))
            return result

        return watched

    def read(self) -> dict[str, list[float]]:
        """{name: the seconds of each call} since the last reading."""
        spans, self.spans = self.spans, {}
        if not self.device.startswith("cuda"):
            return {name: [end - start for start, end in pairs] for name, pairs in spans.items()}
        synchronize(self.device)
        return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in spans.items()}
