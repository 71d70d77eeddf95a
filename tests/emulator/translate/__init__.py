"""PTX statements -> operations of the engine, one module for each family of instructions."""

from . import arithmetic, asynchronous, control, matrix, memory  # noqa: F401  (they register their instructions)
from .entry import translate_module

__all__ = ["translate_module"]
