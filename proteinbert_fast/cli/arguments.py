"""Types of arguments that several commands take."""

import argparse
from collections.abc import Callable


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Some of the known names, with commas between them, each once."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(text.split(",")))
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return given

    return parse
