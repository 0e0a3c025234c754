"""What a launch of `linears` is to compute and how that is cut: the one constant its kernel is compiled for.

The parts of the kernel take it whole, and what follows from it is worked out here, in Python.
"""

from dataclasses import dataclass

TILE = 16  # outputs, that a product of tensor cores has


@dataclass(frozen=True)
class Work:
    """Three weights share a launch; one that is not there has the height 0."""

    rows: int  # of x, up to 16
    heights: tuple[int, int, int]  # outputs of each weight
    blocks: int  # of an output's inputs
    double_quant: bool
    nested_heights: tuple[int, int, int]  # rows of each weight's nested scales
    nested_columns: int
    cell: tuple[int, int]  # rows and blocks that share a nested scale
    rank: int  # of LoRA, 0 without
    lora_weights: int  # that z has ranks for
    residual: bool
    run: int  # neighbouring blocks that a warp takes at a time
    per: int  # tiles of a turn
    warps: int
    programs: int
    slots: int  # stages of a ring that codes and scales come into in bulk; 0: they are loaded
    tall: int = 1  # neighbouring tiles of a stage, which is as much narrower
    ptx: bool = True  # False is for Triton's interpreter

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def groups(self) -> int:
        """Of eight rows of x, which a product takes."""
        return -(-self.rows // 8)

    @property
    def outputs(self) -> int:
        return sum(self.heights)

    @property
    def starts(self) -> tuple[int, int, int]:
        """Each weight's first output."""
        return 0, self.heights[0], self.heights[0] + self.heights[1]

    @property
    def first_tiles(self) -> tuple[int, int, int]:
        first, second, _ = (-(-height // TILE) for height in self.heights)
        return 0, first, first + second

    @property
    def turns(self) -> int:
        """Of all programs, each of all chunks."""
        tiles = self.first_tiles[2] + -(-self.heights[2] // TILE)
        return -(-tiles // self.per)

    @property
    def stages(self) -> int:
        """Of a turn and chunk."""
        return self.per // self.tall

    @property
    def whole_tiles(self) -> bool:
        return all(height % TILE == 0 for height in self.heights)

    @property
    def chunk(self) -> int:
        """Blocks that the warps take together."""
        return self.run * self.warps

    @property
    def chunks(self) -> int:
        return -(-self.blocks // self.chunk)

    @property
    def bulk(self) -> bool:
        return self.slots > 0 and self.ptx

    @property
    def apart(self) -> bool:
        """Whether each block of a run has columns of its own in a product, as many as there are rows of x."""
        return self.run > 1 and self.rows * self.run <= 8

    @property
    def pitch(self) -> int:
        """Bytes from a byte's pair of levels to the next one's: those of 32 lanes, and as many of room for sums, where a byte in
        its place is an address then."""
        return 256 if self.bulk else 128

    @property
    def parts(self) -> int:
        """Numbers that a lane has of a product's sums."""
        return 2 if self.apart else 4

    @property
    def summed_at_once(self) -> int:
        """Products of a turn that have room and warps for their sums."""
        room = 256 if self.bulk else 112  # of 32 lanes' numbers
        return min(room // (self.warps * self.parts), self.warps // self.parts)

    @property
    def scale_values(self) -> int:
        """With the scales of a run: four codes of them in a word, or each a number."""
        return 1 if self.double_quant else self.run

    @property
    def found_values(self) -> int:
        """Words of codes and scales of a tile."""
        return 2 * (2 * self.run + self.scale_values)

    @property
    def loaded_values(self) -> int:
        """Of half a tile, with codes and scales, where they are loaded."""
        return 0 if self.bulk else self.run + self.scale_values

    @property
    def half(self) -> int:
        """All values of half a tile that are loaded: then come its cell's scale and its share of LoRA's factor."""
        return self.loaded_values + (1 if self.double_quant else 0) + (1 if self.rank else 0)

    @property
    def fetched_values(self) -> int:
        """All that is loaded of a tile, and what meets its share of LoRA's factor."""
        return 2 * self.half + (self.groups if self.rank else 0)
