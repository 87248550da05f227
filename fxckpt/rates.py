"""How fast devices are: by their datasheets, or measured and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxckpt.kernels import by_themselves

# What kernels achieve of the figures in datasheets, which nothing reaches: large matrix products
# come to 60 to 80 % of the arithmetic, copies to 80 to 90 % of the bandwidth.
ACHIEVED_RATE, ACHIEVED_BANDWIDTH = 0.7, 0.85
_LAUNCH = 5e-6  # of a CUDA kernel from Python


@dataclasses.dataclass(frozen=True)
class Device:
    """How fast a device is.

    Attributes:
        name: What it is called.
        flops: Operations per second of matrix products, by dtype; a dtype that is not there is as
            fast as float32.
        bandwidth: Bytes per second to and from memory.
        launch: Seconds that any operation takes at least.
        memory: Bytes that a program can use of its memory, about; None if that is not known.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float
    launch: float
    memory: int | None = None

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second on a dtype."""
        return self.flops.get(dtype, self.flops[torch.float32])


def _datasheet(
    name: str,
    fp64: float,
    fp32: float,
    fp16: float,
    bf16: float,
    bandwidth: float,
    memory: float,
) -> Device:
    """A device by its datasheet: dense TFLOP/s without TF32, GB/s; and GiB of memory."""
    by_dtype = {
        torch.float64: fp64,
        torch.float32: fp32,
        torch.float16: fp16,
        torch.bfloat16: bf16,
    }
    rates = {dtype: rate * 1e12 * ACHIEVED_RATE for dtype, rate in by_dtype.items()}
    achieved = bandwidth * 1e9 * ACHIEVED_BANDWIDTH
    return Device(name, rates, achieved, _LAUNCH, int(memory * 2**30))


# From NVIDIA's datasheets: of the SXM variants where there are several, without sparsity, matrix
# products in half precision by tensor cores that accumulate in float32. float64 is that of tensor
# cores from the A100 on. The V100 computes bfloat16 as float32; so does the T4. The memory is what
# torch.cuda reports, rounded down: of the larger variants (V100 32 GB, A100 and H100 80 GB).
DEVICES = {
    device.name: device
    for device in (
        _datasheet("v100", 7.8, 15.7, 125, 15.7, 900, 31.7),
        _datasheet("t4", 0.25, 8.1, 65, 8.1, 320, 14.7),
        _datasheet("a100", 19.5, 19.5, 312, 312, 2039, 79.1),
        _datasheet("a10", 0.49, 31.2, 125, 125, 600, 22.0),
        _datasheet("l4", 0.47, 30.3, 121, 121, 300, 22.0),
        _datasheet("l40s", 1.4, 91.6, 362, 362, 864, 44.4),
        _datasheet("rtx3090", 0.56, 35.6, 71, 71, 936, 23.6),
        _datasheet("rtx4090", 1.3, 82.6, 165.2, 165.2, 1008, 23.5),
        _datasheet("h100", 67, 67, 989, 989, 3350, 79.1),
        _datasheet("h200", 67, 67, 989, 989, 4800, 139.8),
    )
}


# --- measured -------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def measured(device: torch.device) -> Device:
    """A device as it is found: matrix products of each dtype, copies, small operations.

    It is measured once: the rates are kept in a file, so that all processes make the same plans.
    The file is `rates.json` in the folder that the environment variable `FXCKPT_CACHE_DIR` names,
    by default `fxckpt` in the user's folder for caches; without the file it is measured again.
    """
    key = _description(device)
    if (found := _kept().get(key)) is not None:
        flops = {getattr(torch, name): rate for name, rate in found["flops"].items()}
        return Device(str(device), flops, found["bandwidth"], found["launch"])
    size, length = (4096, 1 << 26) if device.type == "cuda" else (384, 1 << 24)
    with by_themselves(device):
        made = Device(
            str(device),
            {dtype: _matrix_rate(device, dtype, size) for dtype in _DTYPES},
            _bandwidth(device, length),
            _launch(device),
        )
    _keep(key, made)
    return made


def _description(device: torch.device) -> str:
    """What makes rates differ."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{platform.node()}, {device.type}, {threads} threads, torch {torch.__version__}"


def _file() -> Path:
    folder = os.environ.get("FXCKPT_CACHE_DIR")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(folder) if folder else Path(user) / "fxckpt") / "rates.json"


def _kept() -> dict[str, Any]:
    """The contents of the file; nothing if it cannot be read."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(key: str, device: Device) -> None:
    """Adds a device to the file, if that can be written."""
    flops = {str(dtype).removeprefix("torch."): rate for dtype, rate in device.flops.items()}
    entry = {"flops": flops, "bandwidth": device.bandwidth, "launch": device.launch}
    path = _file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_kept(), key: entry}, file, indent=1)
        os.replace(file.name, path)  # whole at any moment, whoever else writes


def _matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    return float(2 * size**3 / seconds_of(lambda: a @ a, device))


def _bandwidth(device: torch.device, length: int) -> float:
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * length / seconds_of(lambda: target.copy_(source), device)


def _launch(device: torch.device) -> float:
    x = torch.ones(1, device=device)

    def several() -> None:
        for _ in range(100):
            torch.neg(x)

    return seconds_of(several, device) / 100


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The median time of a few calls, after one that does not count."""

    def timed() -> float:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        return time.perf_counter() - start

    timed()
    return statistics.median(timed() for _ in range(repeats))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
