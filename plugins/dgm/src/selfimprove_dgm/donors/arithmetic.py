"""Another arithmetic operation."""

import ast

OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div)


def edits(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            old = node.op
            for new in OPERATIONS:
                if not isinstance(old, new):
                    node.op = new()
                    yield
                    node.op = old
