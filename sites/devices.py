"""The CUDA devices of this machine, found without initialising CUDA in this process.

Processes that are forked from this one could not use CUDA otherwise. NVIDIA's management library
answers in milliseconds. Without it (no driver, or another vendor's devices) a fresh interpreter
asks torch.
"""

import ctypes
import os
import subprocess
import sys

_ASK_TORCH = "import torch; print(torch.cuda.device_count())"
_TIMEOUT_S = 120.0


def missing_device(gpus: str) -> str | None:
    """Describe what is wrong with a list of devices such as "0,1"; None if all of them exist.

    Entries that are not numbers, such as the id of a part of a device, are left to CUDA.
    """
    return why_missing(gpus, num_devices()) if _numbers(gpus) else None


def why_missing(gpus: str, count: int) -> str | None:
    """Like `missing_device`, for a machine with `count` devices."""
    numbers = _numbers(gpus)
    if not numbers or max(numbers) < count:
        return None
    if count == 0:
        return f"gpus={gpus!r}, but this machine has no CUDA device: leave gpus out to run on the CPU"
    there = "only device 0" if count == 1 else f"the devices 0 to {count - 1}"
    return f"gpus={gpus!r} names device {max(numbers)}, but this machine has {there}"


def _numbers(gpus: str) -> list[int]:
    return [int(part) for part in gpus.split(",") if part.strip().isdigit()]


def num_devices() -> int:
    """The number of devices that `CUDA_VISIBLE_DEVICES` can name."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            try:
                count = ctypes.c_uint()
                if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
                    return count.value
            finally:
                library.nvmlShutdown()
    except (OSError, AttributeError):  # no driver, or one too old for any torch
        pass
    return _ask_torch()


def _ask_torch() -> int:
    everything = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    answer = subprocess.run(
        [sys.executable, "-P", "-c", _ASK_TORCH],
        env=everything,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    # Without torch, nothing here uses a device.
    return int(answer.stdout) if answer.returncode == 0 and answer.stdout.strip().isdigit() else 0
