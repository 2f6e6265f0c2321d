"""How do we log? So that a log handler that fails costs nobody an answer."""

from __future__ import annotations

from contextlib import suppress
from logging import Logger
from typing import Any


def tell(
    logger: Logger, level: int, message: str, *args: object, exc_info: Any = None
) -> None:
    """Log a message, as ``logger.log()``; raise nothing that a handler raises."""
    with suppress(Exception):
        logger.log(level, message, *args, exc_info=exc_info, stacklevel=2)
