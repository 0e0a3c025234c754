"""What a launch of `between_attentions` is to compute and how that is cut: the one constant its kernel is compiled for."""

from dataclasses import dataclass

from pallas_kernels.nf4.grouped_work import Work

AT_ONCE = 8  # neighbouring numbers of a row that a thread reads


@dataclass(frozen=True)
class LowRank:
    """LoRA's first product of a group of linears, which all programs share: z = x A^T in summands, each of a slice of x."""

    rows: int
    width: int  # of x
    linears: int  # each with ranks of its own
    rank: int  # of each, a multiple of 16; 0 without LoRA
    columns: int  # of the second factor's rows, of which the first `rank` count
    slices: int
    first: int  # of its summands, among those of all groups

    @property
    def ranks(self) -> int:
        return self.linears * self.rank

    @property
    def slice(self) -> int:
        return self.width // self.slices

    @property
    def pieces(self) -> int:
        return self.ranks * self.slices


@dataclass(frozen=True)
class LayerWork:
    """Four products, one after the other."""

    o: Work
    mlp: Work
    down: Work
    qkv: Work
    low_o: LowRank
    low_mlp: LowRank
    low_down: LowRank
    low_qkv: LowRank
    layers: int
    eps: float
    programs: int

    @property
    def rows(self) -> int:
        return self.o.rows

    @property
    def threads(self) -> int:
        return self.o.threads

    @property
    def hidden(self) -> int:
        return self.o.outputs

    @property
    def inner(self) -> int:
        """Of the MLP."""
        return self.mlp.heights[0]
