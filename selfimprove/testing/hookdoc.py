"""The reference of the hooks, written from `hooks.py`: ``python -m selfimprove.testing.hookdoc > docs/hooks.md``."""

from __future__ import annotations

import inspect
import sys

from selfimprove import hooks


def document() -> str:
    """The text of docs/hooks.md."""
    role_of = {spec: role for role, spec in hooks.ROLES.items()}
    parts = ["# Hooks\n", inspect.getdoc(hooks) or "", ""]
    for spec in hooks.SPECS:
        parts.append(f"## {spec.__name__}" + (f" (role `{role_of[spec]}`)" if spec in role_of else "") + "\n")
        if spec.__doc__:
            parts.append((inspect.getdoc(spec) or "") + "\n")
        for name, function in vars(spec).items():
            options = getattr(function, f"{hooks.PROJECT}_spec", None)
            if options is None:
                continue
            kind = "first result" if options["firstresult"] else "historic" if options["historic"] else "all are called"
            signature = str(inspect.signature(function)).replace("'", "")
            parts.append(f"### {name}\n\n```python\ndef {name}{signature}: ...\n```\n\n{inspect.getdoc(function)} ({kind})\n")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
