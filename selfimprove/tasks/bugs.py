"""Small bugs of a Python function, as edits of its syntax tree.

Every kind is a generator over a tree: at each yield the tree holds one bug more than before, and the next step takes it out again.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

Bugs = Callable[[ast.AST], Iterator[None]]

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv, ast.Add),
    ast.FloorDiv: (ast.Mult, ast.Mod),
    ast.Div: (ast.FloorDiv,),
    ast.Mod: (ast.FloorDiv,),
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "upper": "lower", "lower": "upper", "isupper": "islower", "islower": "isupper"}


def comparison(tree: ast.AST) -> Iterator[None]:
    """``<`` for ``<=`` or ``>``, ``==`` for ``!=`` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for i, old in enumerate(node.ops):
                for new in _COMPARISONS.get(type(old), ()):
                    node.ops[i] = new()
                    yield
                    node.ops[i] = old


def arithmetic(tree: ast.AST) -> Iterator[None]:
    """``+`` for ``-``, ``*`` for ``//`` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            old = node.op
            for new in _ARITHMETIC.get(type(old), ()):
                node.op = new()
                yield
                node.op = old


def constant(tree: ast.AST) -> Iterator[None]:
    """A whole number that is off by one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            old = node.value
            for new in (old + 1, old - 1):
                node.value = new
                yield
                node.value = old


def boolean(tree: ast.AST) -> Iterator[None]:
    """``and`` for ``or``, and the reverse."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BoolOp):
            old = node.op
            node.op = ast.Or() if isinstance(old, ast.And) else ast.And()
            yield
            node.op = old


def condition(tree: ast.AST) -> Iterator[None]:
    """The opposite of a condition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            old = node.test
            node.test = old.operand if isinstance(old, ast.UnaryOp) and isinstance(old.op, ast.Not) else ast.UnaryOp(ast.Not(), old)
            yield
            node.test = old


def arguments(tree: ast.AST) -> Iterator[None]:
    """The first two arguments of a call, swapped."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) >= 2:
            node.args[0], node.args[1] = node.args[1], node.args[0]
            yield
            node.args[0], node.args[1] = node.args[1], node.args[0]


def call(tree: ast.AST) -> Iterator[None]:
    """``min`` for ``max``, ``lower`` for ``upper`` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in _CALLS:
            node.id = _CALLS[node.id]
            yield
            node.id = _CALLS[node.id]
        elif isinstance(node, ast.Attribute) and node.attr in _CALLS:
            node.attr = _CALLS[node.attr]
            yield
            node.attr = _CALLS[node.attr]


def variable(tree: ast.AST) -> Iterator[None]:
    """Another variable of the function."""
    names = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {a.arg for a in _arguments(tree)})
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
            old = node.id
            for new in names:
                if new != old:
                    node.id = new
                    yield
                    node.id = old


KINDS: dict[str, Bugs] = {f.__name__: f for f in (comparison, arithmetic, constant, boolean, condition, arguments, call, variable)}


def _arguments(tree: ast.AST) -> Iterator[ast.arg]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            yield from (*node.posonlyargs, *node.args, *node.kwonlyargs)


def with_bug(source: str, kind: str, number: int) -> str:
    """The source with bug `number` of a kind. Raises: IndexError, where it has no such bug."""
    tree = ast.parse(source)
    for i, _ in enumerate(KINDS[kind](tree)):
        if i == number:
            return ast.unparse(tree)
    raise IndexError(f"the source has no {kind} bug {number}")


def count(source: str, kind: str) -> int:
    """How many bugs of a kind a source can have."""
    return sum(1 for _ in KINDS[kind](ast.parse(source)))
