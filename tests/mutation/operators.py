"""The small changes that a source file offers: each replaces one piece of its text by another."""

import ast
from dataclasses import dataclass

SWAPPED: dict[type, str] = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "&",
    ast.And: "or", ast.Or: "and",
}  # fmt: skip
SAID = ("log", "logging", "warnings")  # calls on these only say something
TEXTS = ("description", "help", "metavar", "title", "noun", "remedy")  # arguments that are words for a reader


@dataclass(frozen=True)
class Mutant:
    """``file`` with ``old`` at ``start`` (an offset into its text) replaced by ``new``."""

    file: str
    line: int
    kind: str
    start: int
    old: str
    new: str

    def applied(self, source: str) -> str:
        assert source.startswith(self.old, self.start), f"{self.file} is not the file that {self} was found in"
        return source[: self.start] + self.new + source[self.start + len(self.old) :]


class _Finder(ast.NodeVisitor):
    """Visits what is executed: no docstrings, type hints, decorators, messages or log texts."""

    def __init__(self, file: str, source: str):
        self.file, self.source, self.found = file, source, list[Mutant]()
        encoded = [len(line) for line in source.splitlines(keepends=True)]
        self._starts = [sum(encoded[:i]) for i in range(len(encoded) + 1)]
        self._lines = source.splitlines()

    def offset(self, line: int, column: int) -> int:
        """Into the text, of a place that ast gives in bytes of UTF-8."""
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.expr | ast.stmt) -> str:
        return self.source[slice(*self.span(node))]

    def add(self, line: int, kind: str, start: int, end: int, new: str) -> None:
        self.found.append(Mutant(self.file, line, kind, start, self.source[start:end], new))

    def replace(self, node: ast.expr | ast.stmt, kind: str, new: str) -> None:
        self.add(node.lineno, kind, *self.span(node), new)

    def between(self, left: ast.expr, right: ast.expr, kind: str, old: str, new: str) -> None:
        """Replaces the operator that stands between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        at = self.source.find(old, start, end)
        if at >= 0:
            self.add(self.source.count("\n", 0, at) + 1, kind, at, at + len(old), new)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            self.between(left, right, "comparison", SIGNS[type(op)], SWAPPED[type(op)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in SWAPPED:
            self.between(node.left, node.right, "arithmetic", SIGNS[type(node.op)], SWAPPED[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, "and/or", SIGNS[type(node.op)], SWAPPED[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self.replace(node, "sign or not removed", self.text(node.operand))
        self.generic_visit(node)

    def _condition(self, node: ast.If | ast.While | ast.IfExp) -> None:
        self.replace(node.test, "condition negated", f"(not ({self.text(node.test)}))")
        self.generic_visit(node)

    visit_If = visit_While = visit_IfExp = _condition

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace(node, "constant", str(not value))
        elif isinstance(value, int):
            self.replace(node, "constant", f"{value + 1}")
            self.replace(node, "constant", f"({value - 1})")
        elif isinstance(value, float):
            self.replace(node, "constant", f"({value!r} + 1)")
            self.replace(node, "constant", f"({value!r} * 2 - 1)")

    def visit_Call(self, node: ast.Call) -> None:
        if _root(node.func) in SAID:
            return
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in TEXTS:
                self._drop_keyword(node, keyword)
        plain = [a for a in node.args if not isinstance(a, ast.Starred)]
        if len(plain) == len(node.args) >= 2 and self.text(plain[0]) != self.text(plain[1]):
            (start, end), (_, last) = self.span(plain[0]), self.span(plain[1])
            middle = self.source[end : self.span(plain[1])[0]]
            self.add(node.lineno, "arguments swapped", start, last, self.text(plain[1]) + middle + self.text(plain[0]))
        self.visit(node.func)
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg not in TEXTS:
                self.visit(keyword.value)

    def _drop_keyword(self, call: ast.Call, keyword: ast.keyword) -> None:
        start, end = self.offset(keyword.lineno, keyword.col_offset), self.span(keyword.value)[1]
        if self.source[end:].lstrip().startswith(","):
            end = self.source.index(",", end) + 1
        else:  # the last one takes the comma before it along
            before = self.source[:start].rstrip()
            start = len(before) - 1 if before.endswith(",") else start
        self.add(keyword.lineno, f"argument {keyword.arg} dropped", start, end, "")

    def _drop(self, node: ast.stmt) -> None:
        self.replace(node, "statement dropped", "pass")
        self.generic_visit(node)

    visit_AugAssign = visit_Raise = visit_Continue = visit_Break = visit_Delete = _drop

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):  # a docstring, or "..."
            return
        if isinstance(node.value, ast.Call) and _root(node.value.func) in SAID:
            return
        if not isinstance(node.value, ast.Yield | ast.YieldFrom):
            self.replace(node, "statement dropped", "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self.replace(node, "statement dropped", "pass")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self.replace(node.value, "returns nothing", "None")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arguments(self, node: ast.arguments) -> None:
        for default in [*node.defaults, *(d for d in node.kw_defaults if d is not None)]:
            self.visit(default)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.visit(node.args)
        for statement in node.body:
            self.visit(statement)

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_Assert(self, node: ast.Assert) -> None:
        """What an assert says cannot happen: to change it changes nothing."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Words for a reader; Python 3.11 gives no places in them either."""

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if _root(node.value) not in ("Literal", "Callable", "Annotated", "Generic"):  # a type that has a name
            self.generic_visit(node)


SIGNS: dict[type, str] = {
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not",
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.LShift: "<<", ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^",
    ast.And: "and", ast.Or: "or",
}  # fmt: skip


def _root(node: ast.expr) -> str:
    """a of a.b.c"""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def mutants_of(file: str, source: str) -> list[Mutant]:
    """All that ``source`` offers."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return finder.found


def is_python(mutant: Mutant, source: str) -> bool:
    """Whether the change leaves Python, and another program."""
    try:
        return ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False
