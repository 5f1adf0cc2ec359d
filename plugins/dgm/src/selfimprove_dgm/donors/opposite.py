"""The opposite function: min for max, lower for upper and the like."""

import ast

PAIRS = (("min", "max"), ("any", "all"), ("upper", "lower"), ("isupper", "islower"))
OTHER = {a: b for one, two in PAIRS for a, b in ((one, two), (two, one))}


def edits(tree):
    for node in ast.walk(tree):
        for kind, name in ((ast.Name, "id"), (ast.Attribute, "attr")):
            if isinstance(node, kind) and (old := getattr(node, name)) in OTHER:
                setattr(node, name, OTHER[old])
                yield
                setattr(node, name, old)
