"""Rounding of counts and bytes."""


def round_up(value: int, step: int) -> int:
    """The smallest multiple of ``step`` that is no less than ``value``."""
    return -(-value // step) * step
