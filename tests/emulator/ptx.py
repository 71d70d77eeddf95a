"""Reads PTX text into entries, statements and source locations. Knows nothing of what instructions mean."""

import re
from dataclasses import dataclass, field

from .errors import PtxError

SIZES = {"pred": 1, "b128": 16}
SIZES |= {f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}
SIZES |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "u16x2": 4, "s16x2": 4, "f32": 4, "f64": 8}

_TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"|\n|::|[;{}:]", re.S)
_LINE_DIRECTIVE = re.compile(r"\.(loc|file|version|target|address_size)\b[^\n]*")
_LOC = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:,\s*function_name[^,]*,\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?[^/]*(?://(.*))?"
)
_FILE = re.compile(r"\.file\s+(\d+)\s+\"([^\"]*)\"")
_INLINED = re.compile(r"@\[\s*([^\s\]]+:\d+):\d+")


@dataclass(frozen=True)
class Site:
    """Where an instruction comes from. `source` is "file.py:line", with its callers if it was inlined, or empty."""

    source: str
    line: int
    text: str

    def __str__(self):
        ptx = f"PTX line {self.line}: {self.text[:90]}"
        return f"{self.source} ({ptx})" if self.source else ptx


@dataclass
class Statement:
    line: int
    text: str
    source: str = ""
    opens_block: bool = False


@dataclass
class Label:
    line: int
    name: str


@dataclass
class Block:
    """A brace-enclosed scope of registers and labels."""

    line: int
    items: list = field(default_factory=list)

    def statements(self):
        """Every statement in it, those of inner blocks too."""
        for item in self.items:
            if isinstance(item, Block):
                yield from item.statements()
            elif not isinstance(item, Label):
                yield item


@dataclass
class Param:
    name: str
    offset: int
    size: int
    type: str  # "u64", "f32", ...; "b8" with size > 1 for by-value structures


@dataclass
class Variable:
    """A .shared, .global, .const or .local variable of a module."""

    name: str
    space: str
    align: int
    size: int  # 0: dynamic shared memory
    initial: bytes = b""


@dataclass
class Entry:
    name: str
    params: list
    body: Block
    directives: dict  # "reqntid" -> (128, 1, 1), "reqnctapercluster", "maxntid", ...

    @property
    def param_bytes(self):
        return self.params[-1].offset + self.params[-1].size if self.params else 0


@dataclass
class Function:
    """A device function: the names of its results and parameters, which all live in .param space."""

    name: str
    results: list
    params: list
    body: Block


@dataclass
class Module:
    entries: dict
    functions: dict
    variables: list


def parse(text):
    """PTX text -> Module. Raises PtxError with the line for anything that is not understood."""
    root = _scan(text)
    entries, functions, variables = {}, {}, []
    items = iter(root.items)
    for item in items:
        if isinstance(item, Block):
            raise PtxError(f"PTX line {item.line}: a block outside any function")
        if isinstance(item, Label):
            raise PtxError(f"PTX line {item.line}: a label outside any function")
        header = item.text
        if ".entry" in header:
            entry = _entry(item, next(items))
            entries[entry.name] = entry
        elif ".func" in header:
            if item.opens_block:
                function = _function(item, next(items))
                functions[function.name] = function
        elif variable := parse_variable(item):
            variables.append(variable)
        elif not header.startswith((".pragma", ".alias")):
            raise PtxError(f"PTX line {item.line}: unknown directive {header[:80]}")
    if not entries:
        raise PtxError("no entry in the PTX")
    return Module(entries, functions, variables)


def _scan(text):
    """Splits the text into a tree of blocks, labels and statements, each with its line and source location."""
    root = Block(1)
    stack, files, callers = [root], {}, {}
    locations = []  # statements with the .loc in force, resolved once all .file are known
    pending, start_line, line, position, nested, location = [], 0, 1, 0, 0, None

    def add(chunk):
        nonlocal start_line
        if chunk and (pending or not chunk.isspace()):
            if not pending:
                start_line = line
            pending.append(chunk)

    while position < len(text):
        match = _TOKEN.search(text, position)
        end = match.start() if match else len(text)
        chunk = text[position:end]
        directive = (
            None
            if pending or "." not in chunk
            else _LINE_DIRECTIVE.match(text, position + len(chunk) - len(chunk.lstrip()))
        )
        if directive:
            location = _directive(directive.group(), files, callers, location)
            position = directive.end()
            continue
        add(chunk)
        if not match:
            break
        token, position = match.group(), match.end()
        if token[0] == "/" or token == "\n":
            line += token.count("\n")
            add(" ")
        elif token == ";" and not nested:
            statement = Statement(start_line or line, _flat(pending))
            if statement.text:
                stack[-1].items.append(statement)
                locations.append((statement, location))
            pending.clear()
        elif token == "{" and _flat(pending).startswith(".section"):
            position = text.index("}", position) + 1  # debug information, without nested braces
            line += text.count("\n", match.end(), position)
            pending.clear()
        elif token == "{" and not nested and _opens_block(pending):
            if pending:
                stack[-1].items.append(Statement(start_line, _flat(pending), opens_block=True))
                pending.clear()
            stack.append(Block(line))
        elif token == "}" and not nested:
            block = stack.pop()
            if not stack or _flat(pending):
                raise PtxError(f"PTX line {line}: unbalanced braces near {_flat(pending)[:60]!r}")
            pending.clear()
            stack[-1].items.append(block)
        elif token == ":" and re.fullmatch(r"[\w$%]+", _flat(pending)):
            stack[-1].items.append(Label(line, _flat(pending)))
            pending.clear()
        else:
            nested += (token == "{") - (token == "}")
            add(token)
    if len(stack) != 1 or _flat(pending):
        raise PtxError(f"PTX line {line}: unexpected end of the text")
    for statement, where in locations:
        statement.source = _source(where, files)
    return root


def _flat(pending):
    return " ".join("".join(pending).split())


def _opens_block(pending):
    header = _flat(pending)
    return not header or ".entry" in header or ".func" in header


def _directive(text, files, callers, location):
    """The location in force after a directive; `callers` remembers from where each place is inlined."""
    if match := _FILE.match(text):
        files[int(match.group(1))] = match.group(2).rsplit("/", 1)[-1]
    if match := _LOC.match(text):
        number, line, column = (int(match.group(i)) for i in (1, 2, 3))
        inlined = tuple(_INLINED.findall(match.group(7) or ""))
        if match.group(4):
            # nvcc gives one level, and gave that place's own caller in front.
            caller = tuple(int(match.group(i)) for i in (4, 5, 6))
            inlined = (caller[:2], *callers.get(caller, ()))
        callers[number, line, column] = inlined
        return number, line, inlined
    return location


def _source(location, files):
    if not location:
        return ""
    number, line, inlined = location
    chain = [f"{files.get(number, f'file {number}')}:{line}"]
    for caller in inlined:
        # Triton's comment says file:line, nvcc's directive file number and line.
        chain.append(caller if isinstance(caller, str) else f"{files.get(caller[0], '?')}:{caller[1]}")
    return " < ".join(chain)


def _entry(header, body):
    match = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?(.*)$", header.text)
    if not match:
        raise PtxError(f"PTX line {header.line}: cannot read the entry {header.text[:80]!r}")
    params, offset = [], 0
    for text in filter(None, (part.strip() for part in (match.group(2) or "").split(","))):
        param = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?",
            text,
        )
        if not param or param.group(2) not in SIZES:
            raise PtxError(f"PTX line {header.line}: cannot read the parameter {text!r}")
        size = SIZES[param.group(2)]
        offset = -(-offset // int(param.group(1) or size)) * int(param.group(1) or size)
        params.append(Param(param.group(3), offset, size * int(param.group(4) or 1), param.group(2)))
        offset += params[-1].size
    numbers = re.findall(r"\.(\w+)\s+(\d+(?:\s*,\s*\d+)*)", match.group(3))
    directives = {name: tuple(int(number) for number in values.split(",")) for name, values in numbers}
    return Entry(match.group(1), params, body, directives)


def _function(header, body):
    match = re.search(r"\.func\s*(?:\((.*?)\)\s*)?([\w$]+)\s*(?:\((.*?)\))?", header.text)
    if not match or ".reg" in header.text:
        raise PtxError(f"PTX line {header.line}: cannot read the function {header.text[:80]!r}")
    results, params = (re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", match.group(i) or "") for i in (1, 3))
    return Function(match.group(2), results, params, body)


def parse_variable(statement):
    """A Statement that declares a variable -> Variable; None if it does not."""
    match = re.fullmatch(
        r"(?:\.visible\s+|\.extern\s+|\.weak\s+|\.common\s+)*\.(shared|global|const|local|param)\s+(?:\.align\s+(\d+)\s+)?"
        r"(?:\.attribute\([^)]*\)\s+)?\.(\w+)\s+([\w$]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?",
        statement.text,
    )
    if not match or match.group(3) not in SIZES:
        return None
    space, align, kind, name, extents, value = match.groups()
    size = SIZES[kind]
    for extent in re.findall(r"\[(\d*)\]", extents):
        size *= int(extent or 0)
    initial = b""
    if value:
        try:
            numbers = [_initial_value(word.strip()) for word in value.strip("{} ").split(",")]
        except ValueError:
            raise PtxError(f"PTX line {statement.line}: cannot read the initial value of {name}") from None
        initial = b"".join((number % (1 << 8 * SIZES[kind])).to_bytes(SIZES[kind], "little") for number in numbers)
    return Variable(name, space, int(align or SIZES[kind]), size, initial)


def _initial_value(word):
    """An integer; of a floating-point constant, which is written in hexadecimal, its bits."""
    return int(word[2:], 16) if re.match("0[fFdD]", word) else int(word.rstrip("U"), 0)


def split_operands(text):
    """Splits at the commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return parts + [last] if last else parts
