"""Text from a model."""

from fastjax.generate.decode import generate

__all__ = ["generate"]
