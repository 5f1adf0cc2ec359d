"""Two arguments of a call, swapped."""

import ast


def edits(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for i in range(len(node.args) - 1):
                node.args[i], node.args[i + 1] = node.args[i + 1], node.args[i]
                yield
                node.args[i], node.args[i + 1] = node.args[i + 1], node.args[i]
