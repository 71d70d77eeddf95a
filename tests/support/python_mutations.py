"""Small changes to Python functions, made by rule: what the mutation score of the Triton kernels counts."""

import ast
import re
from collections.abc import Iterator

from tests.support.mutation import Mutation

# What is easily taken for another: attributes and names of the two sides of something.
_PAIRS = (
    ("M", "N"), ("N", "K"), ("K", "R"), ("block_m", "block_n"), ("block_n", "block_k"), ("gradient_m", "gradient_n"),
    ("row", "column"), ("offs_m", "offs_n"), ("offs_n", "offs_r"), ("offs_k", "offs_n"), ("first_n", "column"),
    ("stride_n", "stride_r"), ("stride_xm", "stride_ar"), ("stride_wn", "stride_bn"), ("left", "right"),
    ("lora_a", "lora_b"), ("da", "db"), ("first_row", "end_row"), ("index", "count"), ("n_rows", "n_columns"),
    ("tiles_a", "tiles_b"), ("low", "high"), ("of_sum", "in_s"), ("m", "n"), ("n", "k"),
)  # fmt: skip
_OTHER = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_COMPARED = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",),
}  # fmt: skip
_CALCULATED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "//", ast.BitAnd: "|"}
_SYNCHRONISES = re.compile(r"(tl\.debug_barrier|wait_for|publish)\(.*\)$", re.S)
_EXTREMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}


def find(text: str) -> list[Mutation]:
    """Every mutation of the functions in a module's text, in its order."""
    finder = _Finder(text)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            finder.visit(node)
    return sorted(set(finder.found), key=lambda mutation: (mutation.start, mutation.end, mutation.new))


class _Finder(ast.NodeVisitor):
    def __init__(self, text: str):
        self.text, self.found = text, []
        self._starts = [0]
        for line in text.encode().splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._bytes = text.encode()

    def _offset(self, line: int, column: int) -> int:
        return len(self._bytes[: self._starts[line - 1] + column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _source(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.text[start:end]

    def _replace(self, rule: str, node: ast.AST, new: str) -> None:
        start, end = self._span(node)
        if new != self.text[start:end]:
            self.found.append(Mutation(rule, start, end, self.text[start:end], new))

    def _between(self, rule: str, left: ast.AST, right: ast.AST, new: str) -> None:
        """Replaces the operator between two operands; brackets around these stay."""
        start, end = self._span(left)[1], self._span(right)[0]
        gap = self.text[start:end]
        found = re.search(r"[^\s()]+(\s+not)?", gap)
        if found and new != found[0]:
            self.found.append(Mutation(rule, start + found.start(), start + found.end(), found[0], new))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Neither decorators nor annotations nor defaults."""
        for statement in _without_docstring(node.body):
            self.visit(statement)
        self._move(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.visit(statement)

    def _move(self, body: list[ast.stmt]) -> None:
        """A barrier, wait or release trades places with its neighbour."""
        for node in ast.walk(ast.Module(body, [])):
            for block in (getattr(node, name, None) for name in ("body", "orelse")):
                if not isinstance(block, list):
                    continue
                for first, second in zip(block, block[1:], strict=False):
                    texts = self._source(first), self._source(second)
                    if any(_SYNCHRONISES.match(each) for each in texts) and not _is_docstring(first):
                        start, end = self._span(first)[0], self._span(second)[1]
                        gap = self.text[self._span(first)[1] : self._span(second)[0]]
                        new = texts[1] + gap + texts[0]
                        self.found.append(Mutation("moved", start, end, self.text[start:end], new))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) or self._source(node).startswith("tl.device_assert("):
            return  # assertions are compiled where Triton debugs alone
        if _SYNCHRONISES.match(self._source(node)):
            self._replace("removed", node, "pass")
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self._replace("constant", node, str(node.value + 1))
            self._replace("constant", node, str(node.value - 1))
        elif isinstance(node.value, float) and node.value in (0.0, 1.0):
            self._replace("constant", node, str(1.0 - node.value))
        elif node.value in ("acquire", "release", "acq_rel"):
            self._replace("relaxed", node, '"relaxed"')

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            for other in _COMPARED.get(type(operator), ()):
                self._between("comparison", left, right, other)
            left = right
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self._between("connective", *node.values[:2], "or" if isinstance(node.op, ast.And) else "and")
        for value in node.values:
            self._replace("dropped condition", node, f"({self._source(value)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self._source(node.left), self._source(node.right)
        if other := _CALCULATED.get(type(node.op)):
            self._between("operator", node.left, node.right, other)
        self._replace("dropped term", node, f"({left})")
        if isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd):
            self._replace("dropped term", node, f"({right})")
        if isinstance(node.op, ast.Sub | ast.FloorDiv | ast.Mod):
            operator = {ast.Sub: "-", ast.FloorDiv: "//", ast.Mod: "%"}[type(node.op)]
            self._replace("swapped operands", node, f"(({right}) {operator} ({left}))")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._replace("dropped sign", node, f"({self._source(node.operand)})")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        target, value = self._source(node.target), self._source(node.value)
        self._replace("dropped statement", node, "pass")
        if isinstance(node.op, ast.Add):
            self._replace("operator", node, f"{target} -= {value}")
            self._replace("dropped term", node, f"{target} = {value}")
        self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        test = self._source(node.test)
        self._replace("condition", node.test, f"not ({test})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._replace("condition", node.test, f"not ({self._source(node.test)})")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        arguments = [self._source(argument) for argument in node.args]
        if name in _EXTREMES and len(arguments) == 2:
            self._replace("extreme", node.func, self._source(node.func)[: -len(name)] + _EXTREMES[name])
            for argument in arguments:
                self._replace("dropped clamp", node, f"({argument})")
        if name == "where" and len(arguments) == 3:
            swapped = ", ".join((arguments[0], arguments[2], arguments[1]))
            self._replace("swapped operands", node, f"{self._source(node.func)}({swapped})")
            for argument in arguments[1:]:
                self._replace("dropped choice", node, f"({argument})")
        if name in ("cdiv", "ceil_div") and len(arguments) == 2:
            self._replace("rounded down", node, f"(({arguments[0]}) // ({arguments[1]}))")
        if name == "to" and isinstance(node.func, ast.Attribute):
            self._replace("dropped cast", node, self._source(node.func.value))
            if arguments and arguments[0].endswith("int64"):
                self._replace("narrowed", node.args[0], "tl.int32")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _OTHER:
            self._replace("wrong of a pair", node, f"{self._source(node.value)}.{_OTHER[node.attr]}")
        self.visit(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in _OTHER:
            self._replace("wrong of a pair", node, _OTHER[node.id])


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _without_docstring(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    return (statement for statement in body if not _is_docstring(statement))
