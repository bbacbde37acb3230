"""Devices by name, checked."""

import torch

from proteinbert_fast.errors import InputError


def checked_device(device: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        InputError: the name is unknown, or there is no such device here.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is unknown; try cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device}: there is no such GPU here; `proteinbert-fast doctor` says what there is")
    if device.type not in {"cpu", "cuda"}:
        raise InputError(f"device {device}: only cpu and cuda are supported")
    return device
