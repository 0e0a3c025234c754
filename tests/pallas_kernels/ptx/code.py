"""PTX as a list of statements. Names of an inner scope, which inline assembly opens, get the scope's number."""

import re
from dataclasses import dataclass

from pallas_kernels.triton_call import ROOM

RESERVED = 1024  # bytes of shared memory before a program's own


@dataclass
class Statement:
    guard: tuple[str, bool] | None  # a predicate, and whether it is negated
    name: str
    operands: list[str]
    text: str

    @property
    def operation(self) -> str:
        return self.name.split(".")[0]

    @property
    def kind(self) -> str:
        """The type of what it makes or moves."""
        return self.name.split(".")[-1]


class Code:
    """Statements in order, and where labels are. Names of an inner scope get its number."""

    def __init__(self, ptx: str) -> None:
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.symbols: dict[str, int] = {}
        self.parameters: list[str] = re.findall(r"\.param \.\w+ (?:\.ptr [^,)]*?)?(\w+_param_\d+)", ptx)
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        self.dynamic = int(found[1]) if (found := ROOM.search(ptx)) else 0
        self.end = RESERVED
        body = re.sub(r"//.*|\.loc\s.*", "", ptx[ptx.index(".reqntid") :])
        self._read(body[body.index("{") :])

    def _read(self, text: str) -> None:
        scopes: list[tuple[str, set[str]]] = []
        position, opened = 0, 0
        while position < len(text):
            rest = text[position:].lstrip()
            position = len(text) - len(rest)
            if not rest:
                break
            if rest[0] == "{":
                inner = re.findall(r"(?<!:)\b([A-Za-z]\w*):(?!:)", rest[: closing(rest)])
                scopes.append((f"@{opened}" if scopes else "", set(inner)))
                opened, position = opened + 1, position + 1
            elif rest[0] == "}":
                scopes.pop()
                position += 1
                if not scopes:
                    break
            elif label := re.match(r"([$\w]+):", rest):
                self.labels[self._renamed(label[1], scopes)] = len(self.statements)
                position += label.end()
            else:
                statement = rest[: rest.index(";")]
                position += len(statement) + 1
                self._take(statement.strip(), scopes)

    def _take(self, text: str, scopes: list[tuple[str, set[str]]]) -> None:
        if text.startswith(".reg"):
            for name, count in re.findall(r"(?<!\.)(?<!\w)([\w%]+)(?:<(\d+)>)?(?=,|$)", text.split(None, 2)[2]):
                scopes[-1][1].update([f"{name}{i}" for i in range(int(count))] if count else [name])
            return
        if shared := re.match(r"\.shared \.align (\d+) \.b(\d+) (\w+)\[(\d+)\]", text):
            align, bits, name, count = int(shared[1]), int(shared[2]), shared[3], int(shared[4])
            self.symbols[name] = -(-self.end // align) * align
            self.end = self.symbols[name] + bits // 8 * count
            return
        if text.startswith("."):
            return
        parts = re.match(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
        operands = [self._renamed(each, scopes) for each in split(parts[4])]
        guard = (self._renamed(parts[2], scopes), parts[1] == "!") if parts[2] else None
        self.statements.append(Statement(guard, parts[3], operands, text))

    @staticmethod
    def _renamed(operand: str, scopes: list[tuple[str, set[str]]]) -> str:
        def rename(match: re.Match) -> str:
            for suffix, names in reversed(scopes):
                if match[0] in names:
                    return match[0] + suffix
            return match[0]

        return re.sub(r"[%$]?[A-Za-z_]\w*(?:\.\w+)?", rename, operand)


def closing(text: str) -> int:
    """Where the brace that `text` begins with is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return i
    raise ValueError("a brace is not closed")


def split(text: str) -> list[str]:
    """By commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
