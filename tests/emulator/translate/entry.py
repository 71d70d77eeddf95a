"""Walks the statements of an entry."""

import re

from ..errors import PtxError
from ..program import FILE_64, LOCAL_WINDOW, PARAM_WINDOW, Builder, Scope
from ..ptx import SIZES, Block, Label, Site, parse_variable, split_operands
from .control import RETURN
from .registry import Instruction, translate, translates

SHARED_BASE = 1024  # kSharedBase of engine/memory.h
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
_IGNORED = (".pragma", ".branchtargets", ".callprototype")


class SharedLayout:
    """Places the .shared variables of a module: static ones first, dynamic ones after them."""

    def __init__(self):
        self.addresses, self.top, self.dynamic = {}, SHARED_BASE, []

    def add(self, variable):
        if variable.size == 0:
            self.dynamic.append(variable)
            return
        self.top = -(-self.top // variable.align) * variable.align
        self.addresses[variable.name] = self.top
        self.top += variable.size

    def finish(self):
        """All dynamic variables share one address."""
        align = max((variable.align for variable in self.dynamic), default=16)
        start = -(-self.top // align) * align
        self.addresses |= {variable.name: start for variable in self.dynamic}
        return start - SHARED_BASE


def translate_module(module, global_addresses):
    """-> {entry name: (Entry, Program, bytes of static shared memory)}. Raises PtxError with the line."""
    layout = SharedLayout()
    for variable in module.variables:
        if variable.space == "shared":
            layout.add(variable)
    for function in (*module.entries.values(), *module.functions.values()):  # variables declared inside its body
        for statement in function.body.statements():
            variable = parse_variable(statement) if statement.text.startswith(".shared") else None
            if variable:
                layout.add(variable)
    static_bytes = layout.finish()
    programs = {}
    for entry in module.entries.values():
        symbols = (
            layout.addresses | global_addresses | {param.name: PARAM_WINDOW | param.offset for param in entry.params}
        )
        builder = Builder(symbols, module.functions)
        _walk(entry.body, builder)
        programs[entry.name] = (entry, builder.finish(), static_bytes)
    return programs


def _walk(block, builder):
    builder.scope = Scope(builder.scope)
    builder.scope.labels = {item.name: [None] for item in block.items if isinstance(item, Label)}
    for item in block.items:
        if isinstance(item, Block):
            _walk(item, builder)
        elif isinstance(item, Label):
            builder.place_label(item.name)
        elif item.text.startswith(".reg"):
            _declare_registers(item, builder)
        elif item.text.startswith("."):
            _directive(item, builder)
        else:
            _instruction(item, builder)
    builder.scope = builder.scope.parent


def _declare_registers(statement, builder):
    match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement.text)
    if not match:
        raise PtxError(f"PTX line {statement.line}: cannot read {statement.text!r}")
    if SIZES.get(match.group(1), 16) > 8:
        raise PtxError(f"PTX line {statement.line}: unknown type .{match.group(1)} of registers")
    for name in split_operands(match.group(2)):
        family = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
        for each in [f"{family.group(1)}{i}" for i in range(int(family.group(2)))] if family else [name]:
            builder.declare(each, match.group(1))


def _directive(statement, builder):
    variable = parse_variable(statement)
    if variable and variable.space in ("local", "param"):  # parameters of calls are memory of the thread, too
        builder.local_bytes = -(-builder.local_bytes // variable.align) * variable.align
        builder.symbols[variable.name] = LOCAL_WINDOW | builder.local_bytes
        builder.local_bytes = -(-(builder.local_bytes + variable.size) // 16) * 16
    elif not (variable and variable.space == "shared") and not statement.text.startswith(_IGNORED):
        raise PtxError(f"PTX line {statement.line}: unknown directive {statement.text[:80]}")


def _instruction(statement, builder):
    builder.site = site = Site(statement.source, statement.line, statement.text)
    match = _STATEMENT.fullmatch(statement.text)
    if not match:
        raise PtxError(f"cannot read {site}", [site])
    negated, guard, opcode, operands = match.groups()
    try:
        builder.guard = (-1, False)
        if guard:
            builder.guard = (builder.source(guard, "pred") >> 2, bool(negated))
        translate(Instruction(opcode, opcode.split("."), split_operands(operands)), builder)
    except PtxError as error:
        raise PtxError(f"{error} at {site}", [*error.sites, site]) from None
    except (IndexError, KeyError, ValueError) as error:
        raise PtxError(f"cannot translate {site}: {error!r}", [site]) from error


@translates("call")
def _call(instruction, builder):
    """Functions are copied to where they are called; formal parameters are other names of the actual ones."""
    instruction.only("uni")
    operands = list(instruction.operands)
    results = _names(operands.pop(0)) if operands[0].startswith("(") else []
    name, *rest = operands
    if name == "__assertfail":
        return builder.emit("trap")
    if name == "vprintf":
        places = [*_names(rest[0]), *results]
        return builder.emit("vprintf", [], [builder.constant(builder.symbols[each], FILE_64) for each in places])
    function = builder.functions.get(name)
    if function is None or name in builder.calls or builder.guard != (-1, False):
        raise PtxError(f"{'a recursive' if name in builder.calls else 'this'} call of {name} is not modelled")
    actual, formal = [*results, *(_names(rest[0]) if rest else [])], [*function.results, *function.params]
    symbols, scope, site = dict(builder.symbols), builder.scope, builder.site
    builder.symbols |= {into: symbols[given] for into, given in zip(formal, actual, strict=True)}
    builder.scope = Scope()  # nothing of the caller's
    builder.scope.labels[RETURN] = [None]
    builder.calls.append(name)
    _walk(function.body, builder)
    builder.place_label(RETURN)
    builder.calls.pop()
    builder.symbols, builder.scope, builder.site = symbols, scope, site


def _names(text):
    """(a, b) -> names."""
    return split_operands(text.strip("() "))
