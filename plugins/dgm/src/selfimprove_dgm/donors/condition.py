"""The opposite of a condition."""

import ast


def edits(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            old = node.test
            node.test = old.operand if isinstance(old, ast.UnaryOp) and isinstance(old.op, ast.Not) else ast.UnaryOp(ast.Not(), old)
            yield
            node.test = old
