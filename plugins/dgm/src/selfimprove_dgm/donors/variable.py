"""Another variable of the function."""

import ast


def edits(tree):
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    names = sorted(stored | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)})
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
            old = node.id
            for new in names:
                if new != old:
                    node.id = new
                    yield
                    node.id = old
