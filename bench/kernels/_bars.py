"""What each kernel has to reach, and whether it does: the one place where the bars stand.

A bar is about one measure of a row: its `ratio` to the ceiling measured in the same run, its rate, the memory it takes
beside arguments and results, its time against the best peer's (`against_peer`), or against the same row unpacked
(`speedup`).
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Bar:
    """`case` is a pattern; of `measure` at least or at most `limit`."""

    op: str
    case: str
    implementation: str
    measure: str
    sign: str
    limit: float

    def applies(self, row: dict[str, Any]) -> bool:
        named = (row["op"], row["implementation"]) == (self.op, self.implementation)
        return named and fnmatchcase(row["case"], self.case) and ("failed" in row or self.measure in row)

    def met(self, row: dict[str, Any]) -> bool:
        return "failed" not in row and COMPARE[self.sign](row[self.measure], self.limit)

    def __str__(self) -> str:
        return f"{self.measure} {self.sign} {self.limit:g}"


BARS = (
    Bar("dequantize_nf4", "14336x4096, *", "triton", "ratio", ">=", 0.8),
    Bar("quantize_nf4", "*", "triton", "GB/s", ">=", 1000),
    *(
        Bar("nf4_matmul", f"*/{tokens} *", "chosen", "ratio", ">=", limit)
        for tokens, limit in ((256, 1.2), (4096, 0.93), (16384, 0.97))
    ),
    *(Bar("nf4_matmul", f"*/{tokens} forward", "mosaic", "ratio", ">=", 0.93) for tokens in (4096, 16384)),
    *(Bar("nf4_matmul", f"*/{tokens} input gradient", "triton", "ratio", ">=", 0.93) for tokens in (4096, 16384)),
    *(Bar("nf4_matvec", f"* x {shape}", "triton", "ratio", ">=", 0.75) for shape in ("14336x4096", "4096x14336")),
    Bar("flash_attention", "*", "chosen", "against_peer", ">=", 1),
    Bar("flash_attention", "*", "triton", "against_peer", ">=", 1),
    Bar("flash_attention", "*", "chosen", "speedup", ">=", 4),
    *(Bar(op, way, "triton", "ratio", ">=", 0.8) for op in ("rms_norm", "rope", "swiglu") for way in ("forward", "backward")),
    Bar("linear_cross_entropy", "frozen head, 100% labelled", "triton", "ratio", ">=", round(1 / 1.2, 3)),
    Bar("linear_cross_entropy", "frozen head, 100% labelled", "triton", "extra_MiB", "<=", 1024),
)  # fmt: skip


def judged(rows: Iterable[dict[str, Any]], bars: Sequence[Bar] = BARS) -> list[dict[str, Any]]:
    """Rows with their bars and whether they are `met`, which one that failed is not; a row that has none stays as it is."""
    results = []
    for row in rows:
        own = [bar for bar in bars if bar.applies(row)]
        verdict = {"bar": " and ".join(map(str, own)), "met": all(bar.met(row) for bar in own)} if own else {}
        results.append(row | verdict)
    return results
