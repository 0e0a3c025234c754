"""What a model's parameter is, declared once: its shape, the meaning of its axes, its name in a HF checkpoint.

Initialisation, import, export, sharding and the count of bytes all read these declarations, so that none of
them can disagree with another.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter, or one per decoder layer when `layers` is set.

    `shape` is that of a single tensor as a HF checkpoint stores it ([out, in] for a projection). Parameters of the
    decoder layers are kept stacked, with a leading axis of length `layers` that `shape` and `axes` leave out.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # a logical name per axis of `shape`; fastjax.parallel.rules maps them to mesh axes
    hf_name: str  # with "{layer}" in it when `layers` is set
    layers: int | None = None
    quantize: bool = False  # packed to 4 bits under load_in_4bit
    init: Literal["normal", "ones", "zeros"] = "normal"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.hf_name}: {self.shape=} and {self.axes=} must have one name per axis")

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The shape as kept in memory, with the layer axis in front."""
        return self.shape if self.layers is None else (self.layers, *self.shape)

    def hf_names(self) -> list[str]:
        """The names of its tensors in a HF checkpoint, in layer order."""
        if self.layers is None:
            return [self.hf_name]
        return [self.hf_name.format(layer=layer) for layer in range(self.layers)]
