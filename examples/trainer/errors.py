"""Errors of the examples: the program ends with one line that says what to change, without a traceback."""

from __future__ import annotations

import torch


def fail(message: str) -> None:
    """End the program with an error message and exit status 1."""
    raise SystemExit(f"error: {message}")


def check_device(device: str) -> None:
    """End the program if this machine does not have the device, or if tensors on it hold no values (meta)."""
    try:
        if torch.empty(0, device=device).device.type != "meta":
            return
        reason = "it holds no values"
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either for a missing device
        reason = str(error).splitlines()[0][:100]
    fail(f"--device: got {device!r}, expected cpu, cuda or cuda:1 ({reason})")
