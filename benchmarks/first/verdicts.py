"""What the checks of a run decided, and what may be timed after them. Standard library only."""

from collections.abc import Mapping

CHOSEN, PORTABLE = "chosen", "portable"
GRADIENT = "gradient of "
# Of the operations that a kernel for Hopper may compute.
BLOCK = "local_block"
# Checks of the whole model, and of what is no part of a forward pass.
WHOLE, APART = ("whole model", "same bits"), ("residue mean, same bits",)

# By `key_of`: None for what is right, else why it is wrong.
Verdicts = Mapping[str, str | None]


def key_of(precision: str, kernels: str, name: str) -> str:
    """The name of a verdict.

    Args:
        precision: "bfloat16", say.
        kernels: CHOSEN for those that the library chooses on the device, PORTABLE without those for Hopper.
        name: of an operation, of a check of the whole model, or GRADIENT and an operation.
    """
    return f"{precision}/{kernels}/{name}"


def hopper_failed(verdicts: Verdicts, precision: str) -> str | None:
    """Why timings take the portable local block: that for Hopper or its gradient is wrong, the portable ones right."""
    wrong = _wrong(verdicts, precision, CHOSEN)
    of_block = {name: why for name, why in wrong.items() if _is_block(name)}
    portable = {key: why for key, why in verdicts.items() if key.startswith(f"{precision}/{PORTABLE}/")}
    if not of_block or not portable or any(why is not None for why in portable.values()):
        return None
    name, why = next(iter(of_block.items()))
    return f"{name} failed its check: {why}"


def failed(verdicts: Verdicts, precision: str, gradients: bool) -> dict[str, str]:
    """What must not be timed in a precision, and why, by operation.

    Args:
        verdicts: of the run so far.
        precision: to be timed.
        gradients: of the backward pass too; their operations go by the same names.
    """
    wrong = _wrong(verdicts, precision, CHOSEN)
    if hopper_failed(verdicts, precision) is not None:
        # The portable local block runs. The whole model was not checked with it: its timings compare their own results.
        operations = {key.rpartition("/")[2] for key in verdicts if key.startswith(f"{precision}/{PORTABLE}/")}
        wrong = {name: why for name, why in wrong.items() if name not in {*operations, *WHOLE}}
    found = {name: why for name, why in wrong.items() if not name.startswith(GRADIENT) and name not in APART}
    if gradients:
        found |= {name.removeprefix(GRADIENT): why for name, why in wrong.items() if name.startswith(GRADIENT)}
    return found


def _wrong(verdicts: Verdicts, precision: str, kernels: str) -> dict[str, str]:
    start = f"{precision}/{kernels}/"
    return {key.removeprefix(start): why for key, why in verdicts.items() if key.startswith(start) and why is not None}


def _is_block(name: str) -> bool:
    return name.removeprefix(GRADIENT) in {BLOCK, f"{BLOCK}, hidden kept"}
