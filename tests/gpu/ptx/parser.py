"""PTX text to kernels: parameters, variables, and instructions with their operands and source lines."""

import functools
import re
from dataclasses import dataclass, field

from .errors import PTXError
from .types import width


@dataclass(frozen=True)
class Register:
    """A virtual or special register; `negated` for the predicate !%p."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    """A label, a variable or a parameter."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Pair:
    """Two destinations, as in %p|%q."""

    first: object
    second: object


@dataclass(frozen=True)
class Address:
    """[base + offset], the base a register, a symbol or nothing; `rest` holds TMA's coordinates."""

    base: object
    offset: int
    rest: tuple = ()


@dataclass(frozen=True)
class Instruction:
    """One statement: `name` is the opcode's first part, `modifiers` the others, `line` that of the PTX text."""

    name: str
    modifiers: tuple
    operands: tuple
    guard: Register | None
    line: int
    source: str

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    @property
    def kind(self) -> str:
        """The type of the operation, the opcode's last part."""
        return self.modifiers[-1] if self.modifiers else ""

    def has(self, *modifiers: str) -> bool:
        return any(modifier in self.modifiers for modifier in modifiers)


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    offset: int
    size: int


@dataclass
class Variable:
    """A variable of a state space; `data` is its initial value."""

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""
    offset: int = 0


@dataclass
class Kernel:
    """An entry: `code` with `labels` as indices into it, `registers` as name -> width (1 for predicates)."""

    name: str
    parameters: list[Parameter]
    threads: tuple | None
    registers: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared_size: int = 0
    local_size: int = 0

    @property
    def parameter_size(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
_REGISTERS = re.compile(r"\.reg\s*\.(\w+)\s+(.*)$", re.S)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:[^\n]*?inlined_at\s+(\d+)\s+(\d+))?[^\n]*")
_LABEL = re.compile(r"([$\w]+):(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s.*?([\w$]+)(?:\[(\d+)\])?$", re.S)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_REGISTER_NAME = re.compile(r"%?[\w$]+(?:\.[xyzw])?$")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$|0[fFdD][0-9a-fA-F]+$")


def _without_comments(text: str) -> str:
    """Comments blanked out, line breaks kept, so that offsets still give line numbers."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def _split(text: str) -> list[str]:
    """Operands, separated by the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _variable(match: re.Match) -> Variable:
    count = 1
    for extent in re.findall(r"\[(\d*)\]", match[5]):
        count *= int(extent or 0)
    item = width(match[3]) // 8
    data = b""
    if match[6]:
        values = [int(x, 0) for x in re.findall(r"-?\b(?:0[xX][0-9a-fA-F]+|\d+)\b", match[6])]
        data = b"".join((v & ((1 << 8 * item) - 1)).to_bytes(item, "little") for v in values)
    return Variable(match[4], match[1], int(match[2] or item), item * count, data.ljust(item * count, b"\0"))


class _Body:
    """Reads one kernel's body; a brace opens a scope of register names, as inline assembly uses."""

    def __init__(self, kernel: Kernel, text: str, start: int, files: dict[str, str]):
        self.kernel, self.text, self.at, self.files = kernel, text, start, files
        self.scopes: list[dict[str, str]] = [{}]
        self.source = ""
        self.call_parameters: set[str] = set()
        # Line breaks are counted on the way: str.count over the whole text for every statement would be quadratic.
        self.line, self.counted = text.count("\n", 0, start) + 1, start

    def read(self) -> None:
        while True:
            while self.text[self.at].isspace():
                self.at += 1
            self.line += self.text.count("\n", self.counted, self.at)
            self.counted = self.at
            char = self.text[self.at]
            if char == "}":
                self.scopes.pop()
                self.at += 1
                if not self.scopes:
                    return
            elif char == "{":
                self.scopes.append({})
                self.at += 1
            elif match := _LOCATION.match(self.text, self.at):
                self._location(match)
                self.at = match.end()
            elif match := _LABEL.match(self.text, self.at):
                self.kernel.labels[match[1]] = len(self.kernel.code)
                self.at = match.end()
            else:
                end = self.text.index(";", self.at)
                self._statement(self.text[self.at : end].strip())
                self.at = end + 1

    def _location(self, match: re.Match) -> None:
        name = self.files.get(match[1], "?")
        self.source = f"{name}:{match[2]}"
        if match[3] and self.files.get(match[3]) != name:
            self.source = f"{self.files.get(match[3], '?')}:{match[4]} (in {self.source})"

    def _statement(self, text: str) -> None:
        if not text or text.startswith(".pragma") or ".callprototype" in text:
            return
        if match := _REGISTERS.match(text):
            self._declare(match[1], match[2])
        elif match := _VARIABLE.match(text):
            _add_variable(self.kernel, _variable(match))
        elif text.startswith(".param"):
            self.call_parameters.add(_PARAMETER.search(text)[3])
        elif text[0] == ".":
            raise PTXError(f"line {self.line}: unsupported directive {text.split()[0]}")
        else:
            self._instruction(text)

    def _declare(self, kind: str, names: str) -> None:
        for name in _split(names):
            if match := re.match(r"(%?[\w$]+)<(\d+)>$", name):
                for i in range(int(match[2])):
                    self.kernel.registers[f"{match[1]}{i}"] = width(kind)
                continue
            unique = name if len(self.scopes) == 1 else f"{name}'{len(self.kernel.registers)}"
            self.scopes[-1][name] = unique
            self.kernel.registers[unique] = width(kind)

    def _instruction(self, text: str) -> None:
        match = _INSTRUCTION.match(text)
        if not match:
            raise PTXError(f"line {self.line}: cannot parse {text!r}")
        guard = Register(self._resolve(match[2]), match[1] == "!") if match[2] else None
        name, *modifiers = match[3].split(".")
        if name == "call":
            self._call(match[4], tuple(modifiers), guard)
            return
        passes = name in ("ld", "st") and modifiers[:1] == ["param"]
        if passes and re.search(r"\[\s*([%\w$]+)", match[4])[1] in self.call_parameters:
            return
        operands = tuple(self._operand(part) for part in _split(match[4]))
        self.kernel.code.append(Instruction(name, tuple(modifiers), operands, guard, self.line, self.source))

    def _call(self, text: str, modifiers: tuple, guard: Register | None) -> None:
        """A failed assertion is a trap, and nothing is printed; what calls another function can be read but not run."""
        function = re.search(r"(?:\([^)]*\)\s*,)?\s*([%\w$]+)", text)[1]
        if function != "vprintf":
            name = "trap" if function == "__assertfail" else "call"
            self.kernel.code.append(Instruction(name, modifiers, (), guard, self.line, self.source))

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _operand(self, text: str):
        if text[0] == "{":
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1].strip())
        if "|" in text:
            return Pair(*(self._operand(part.strip()) for part in text.split("|")))
        if _NUMBER.match(text):
            return Immediate(text)
        negated = text[0] == "!"
        name = self._resolve(text.lstrip("!"))
        if name == "_" or name[0] == "%" or name in self.kernel.registers:
            return Register(name, negated)
        if _REGISTER_NAME.match(name):
            return Symbol(name)
        raise PTXError(f"line {self.line}: cannot parse the operand {text!r}")

    def _address(self, text: str) -> Address:
        first, *rest = _split(text)
        match = re.match(r"([%\w$.]+)\s*(?:([+-])\s*(-?\w+))?$", first)
        if not match:
            raise PTXError(f"line {self.line}: cannot parse the address [{text}]")
        offset = int(match[3], 0) * (-1 if match[2] == "-" else 1) if match[3] else 0
        base = self._operand(match[1])
        if isinstance(base, Immediate):
            base, offset = None, offset + int(base.text, 0)
        return Address(base, offset, tuple(self._operand(part) for part in rest))


def _add_variable(kernel: Kernel, variable: Variable) -> None:
    """Places a variable; an array of unknown length is the dynamic shared memory, which follows all others."""
    size = {"shared": "shared_size", "local": "local_size"}.get(variable.space)
    if size and not (variable.space == "shared" and variable.size == 0):
        variable.offset = -(-getattr(kernel, size) // variable.align) * variable.align
        setattr(kernel, size, variable.offset + variable.size)
    kernel.variables[variable.name] = variable


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for part in _split(text or ""):
        match = _PARAMETER.search(part)
        item = width(match[2]) // 8
        size = item * int(match[4] or 1)
        align = int(match[1]) if match[1] and match[4] else item
        offset = -(-offset // align) * align
        parameters.append(Parameter(match[3], match[2], offset, size))
        offset += size
    return parameters


def _module_variables(text: str) -> list[Variable]:
    """What is declared outside of any body."""
    depth, outside = 0, []
    for piece in re.split(r"([{}])", text):
        if piece in "{}" and piece:
            depth += 1 if piece == "{" else -1
            outside.append(piece)
        elif depth == 0 or (outside and outside[-1] == "{" and depth == 1):
            outside.append(piece)
    found = []
    for statement in "".join(outside).split(";"):
        if match := _VARIABLE.search(statement.strip()):
            found.append(_variable(match))
    return found


def _place_dynamic(kernel: Kernel) -> None:
    dynamic = [v for v in kernel.variables.values() if v.space == "shared" and v.size == 0]
    for variable in dynamic:
        variable.offset = -(-kernel.shared_size // variable.align) * variable.align
        kernel.shared_size = max(kernel.shared_size, variable.offset)


def _check_labels(kernel: Kernel) -> None:
    for branch in (i for i in kernel.code if i.name == "bra"):
        if branch.operands[0].name not in kernel.labels:
            raise PTXError(f"line {branch.line}: branch to the unknown label {branch.operands[0].name}")


@functools.lru_cache(maxsize=256)
def parse(text: str) -> dict[str, Kernel]:
    """Every kernel of a module by its name. The result is shared: treat it as read-only."""
    files = {number: path.rsplit("/", 1)[-1] for number, path in _FILE.findall(text)}
    clean = _without_comments(text)
    kernels = {}
    first = _ENTRY.search(clean)
    if first is None:
        raise PTXError("no .entry in the PTX")
    header = _module_variables(clean[: clean.rindex("\n", 0, first.start())])
    for entry in _ENTRY.finditer(clean):
        threads = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", entry[3])
        kernel = Kernel(entry[1], _parameters(entry[2]), tuple(map(int, threads[1].split(","))) if threads else None)
        for variable in header:
            _add_variable(kernel, Variable(**vars(variable)))
        _Body(kernel, clean, entry.end(), files).read()
        _place_dynamic(kernel)
        _check_labels(kernel)
        kernels[kernel.name] = kernel
    return kernels
