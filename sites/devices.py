"""Which CUDA devices this machine has, asked without initialising CUDA in this process: what is
forked from it could not use it.

NVIDIA's management library answers in milliseconds. Where there is none (no driver, or devices of
another make) a fresh interpreter asks torch.
"""

import ctypes
import os
import subprocess
import sys

_ASK_TORCH = "import torch; print(torch.cuda.device_count())"
_TIMEOUT_S = 120.0


def missing_device(gpus: str) -> str | None:
    """What is wrong with a list of devices such as "0,1", in words; None when all of them are
    there.

    What is not a number, such as the id of a part of a device, is left to CUDA.
    """
    return why_missing(gpus, num_devices()) if _numbers(gpus) else None


def why_missing(gpus: str, count: int) -> str | None:
    """As `missing_device`, of a machine with so many devices."""
    numbers = _numbers(gpus)
    if not numbers or max(numbers) < count:
        return None
    if count == 0:
        return f"gpus={gpus!r}, but this machine has no CUDA device: leave gpus out to run on the processor"
    there = "only device 0" if count == 1 else f"the devices 0 to {count - 1}"
    return f"gpus={gpus!r} names device {max(numbers)}, but this machine has {there}"


def _numbers(gpus: str) -> list[int]:
    return [int(part) for part in gpus.split(",") if part.strip().isdigit()]


def num_devices() -> int:
    """How many devices `CUDA_VISIBLE_DEVICES` can name."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2() == 0:
            try:
                count = ctypes.c_uint()
                if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
                    return count.value
            finally:
                library.nvmlShutdown()
    except (OSError, AttributeError):  # no driver, or one that is older than all that torch works with
        pass
    return _ask_torch()


def _ask_torch() -> int:
    everything = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    answer = subprocess.run(
        [sys.executable, "-c", _ASK_TORCH],
        env=everything,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    # Without torch nobody here would use a device.
    return int(answer.stdout) if answer.returncode == 0 and answer.stdout.strip().isdigit() else 0
