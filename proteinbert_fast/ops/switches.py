"""Environment variables that turn kernels off. Read once: compiled code cannot look again."""

import os

from proteinbert_fast.errors import InputError

KERNELS_SWITCH, HOPPER_SWITCH = "PROTEINBERT_FAST_KERNELS", "PROTEINBERT_FAST_HOPPER"


def is_enabled(name: str) -> bool:
    """Whether an environment variable leaves kernels on: 0 turns them off, 1 or nothing is the default.

    Raises:
        InputError: it is set to something else.
    """
    value = os.environ.get(name, "")
    if value not in {"", "0", "1"}:
        raise InputError(f"{name} is {value!r} in the environment: set 0 to turn these kernels off, 1 for the default")
    return value != "0"


KERNELS_ENABLED, HOPPER_ENABLED = is_enabled(KERNELS_SWITCH), is_enabled(HOPPER_SWITCH)
