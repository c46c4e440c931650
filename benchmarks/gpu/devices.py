"""The device that is measured: which one, what it could do at best, and its clock and memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

_PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    r"(NVIDIA )?A100[ -].*(40|80)GB.*": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
    "NVIDIA A10": 125.0,
    "NVIDIA GeForce RTX 4090": 165.0,
}
"""Dense bfloat16 TFLOP/s with float32 sums, by the whole of CUDA's name: an H100 NVL, an A10G or a 4090 D is another
GPU, and so is a part of one (MIG)."""


class NotMeasurableError(Exception):
    """What is asked for cannot be measured here; the text is a sentence for the user."""


@dataclass(frozen=True)
class Memory:
    """Most bytes of the GPU at any one time since `reset_peak`."""

    allocated: int
    """By tensors."""
    reserved: int
    """By the allocator, which keeps what is free in pieces."""


def chosen_device(kind: str | None) -> torch.device:
    """The device of this kind, by default a GPU.

    Raises:
        NotMeasurableError: there is no GPU, or more than one.
    """
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NotMeasurableError("There is no CUDA GPU here: pass --device cpu to try the command's logic without one.")
    if torch.cuda.device_count() > 1:
        raise NotMeasurableError("More than one GPU is visible: name one in CUDA_VISIBLE_DEVICES.")
    return torch.device("cuda", 0)


def peak_tflops(name: str) -> float | None:
    """Dense bfloat16 peak of the GPU that CUDA calls `name`; None where it is not known, never a guess."""
    if "MIG" in name.split():
        return None
    return next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)), None)


def device_name(device: torch.device) -> str:
    """As CUDA calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def device_markdown(device: torch.device) -> str:
    """The device, its driver and CUDA, without an end to the sentence."""
    if device.type != "cuda":
        return "**CPU: this tries the command's logic, its figures say nothing about a GPU**"
    found = torch.cuda.get_device_properties(device)
    return (
        f"**{found.name}** ({found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}), "
        f"driver {_driver()}, CUDA {torch.version.cuda}"
    )


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peaks of memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> Memory | None:
    """The peaks since `reset_peak`; None on a CPU."""
    if device.type != "cuda":
        return None
    return Memory(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def give_back(device: torch.device) -> None:
    """Give unused memory back to the driver, so that what is reserved belongs to what comes next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _driver(version: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", version.read_text())
    except OSError:
        return "unknown"
    return found.group() if found else "unknown"
