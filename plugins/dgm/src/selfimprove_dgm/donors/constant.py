"""A whole number one more or one less."""

import ast


def edits(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            old = node.value
            for new in (old - 1, old + 1):
                node.value = new
                yield
                node.value = old
