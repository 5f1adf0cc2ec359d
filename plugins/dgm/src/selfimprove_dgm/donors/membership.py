"""`in` for `not in`, and `and` for `or`."""

import ast


def edits(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.BoolOp):
            old = node.op
            node.op = ast.Or() if isinstance(old, ast.And) else ast.And()
            yield
            node.op = old
        elif isinstance(node, ast.Compare):
            for i, old in enumerate(node.ops):
                if isinstance(old, ast.In | ast.NotIn):
                    node.ops[i] = ast.NotIn() if isinstance(old, ast.In) else ast.In()
                    yield
                    node.ops[i] = old
