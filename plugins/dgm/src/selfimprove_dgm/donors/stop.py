"""`break` for `continue`, and the reverse."""

import ast


def edits(tree):
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            for i, old in enumerate(block if isinstance(block, list) else ()):
                if isinstance(old, ast.Break | ast.Continue):
                    block[i] = ast.Continue() if isinstance(old, ast.Break) else ast.Break()
                    yield
                    block[i] = old
