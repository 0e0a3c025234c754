"""All of a call of `linear_cross_entropy` that is not an array."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    ignore_index: int = -100
    soft_cap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    vocabulary: int = 0  # words of the whole head
    axis_name: str | None = None  # the mesh axis they are divided over
    chunk: int = 1  # rows
    implementation: str = "xla"  # of the softmax; the matrix products are always XLA's

    @property
    def peak(self) -> float:
        """The label's share of the target, beside its uniform share."""
        return 1 - self.label_smoothing

    @property
    def uniform(self) -> float:
        """Each word's share of the target."""
        return self.label_smoothing / self.vocabulary
