"""Checks of configuration values, alike for every class: each raises a ConfigError naming field, value and range."""

from __future__ import annotations

import sys

from lamella_core.errors import ConfigError

LARGEST_INTEGER = (1 << 31) - 1


def check_integer(name: str, value: object, least: int, most: int | None = None, remedy: str = "") -> None:
    """Refuses what is no integer (True and False are none) or lies outside ``least`` to ``most``.

    Raises:
        ConfigError: see above; ``remedy`` ends the message.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {_shown(value)}; it must be an integer {allowed}{remedy}")


def check_number(name: str, value: object, *, positive: bool = False, remedy: str = "") -> None:
    """Refuses what is no finite number of at least 0, or above 0 when ``positive``.

    Raises:
        ConfigError: see above; ``remedy`` ends the message.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max or (positive and value == 0):  # type: ignore[operator]
        raise ConfigError(
            f"{name} is {_shown(value)}; it must be a finite number {'above' if positive else 'of at least'} 0{remedy}"
        )


def check_flag(name: str, value: object, remedy: str = "") -> None:
    """Refuses what is neither True nor False.

    Raises:
        ConfigError: see above; ``remedy`` ends the message.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {_shown(value)}; it must be true or false{remedy}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
