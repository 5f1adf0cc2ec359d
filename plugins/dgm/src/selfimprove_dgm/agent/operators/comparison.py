"""Another comparison: < for <=, == for != and the like."""

import ast

OTHER = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}


def edits(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for i, old in enumerate(node.ops):
                for new in OTHER.get(type(old), ()):
                    node.ops[i] = new()
                    yield
                    node.ops[i] = old
