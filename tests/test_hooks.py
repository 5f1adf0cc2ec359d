"""Every hook is documented with its exact signature, and exercised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfimprove import hooks
from selfimprove.hooks import hookimpl
from selfimprove.testing import hookdoc, toy_session

DOCUMENT = Path(__file__).parents[1] / "docs" / "hooks.md"
ALL = sorted(name for spec in hooks.SPECS for name, f in vars(spec).items() if hasattr(f, "selfimprove_spec"))


def test_the_document_is_what_the_hooks_say() -> None:
    assert DOCUMENT.read_text() == hookdoc.document(), "write it again: python -m selfimprove.testing.hookdoc > docs/hooks.md"


def test_every_hook_is_documented_with_its_signature() -> None:
    text = DOCUMENT.read_text()
    assert len(ALL) == 12
    for name in ALL:
        assert f"def {name}(self, " in text


def test_every_hook_is_called_by_a_run(tmp_path: Path) -> None:
    class Watches:
        """Implements every observer hook."""

        def __init__(self) -> None:
            self.seen: set[str] = set()

        @hookimpl
        def setup(self) -> None:
            self.seen.add("setup")

        @hookimpl
        def progress(self, stage: str, done: int, total: int) -> None:
            assert 0 <= done <= total
            self.seen.add(stage)

    called: set[str] = set()
    watcher = Watches()
    session = toy_session(tmp_path, observers=[watcher])
    called.add("prepare")  # while the session was made: its stage is what shows it
    undo = session.manager.add_hookcall_monitoring(lambda name, impls, kwargs: called.add(name), lambda *args: None)
    session.improve()
    undo()
    assert sorted(called | ({"setup"} & watcher.seen)) == ALL
    assert watcher.seen >= {"setup", "select", "propose", "apply", "reward", "update", "evaluate"}


def test_the_typed_face_has_every_hook_that_the_loop_calls() -> None:
    assert {n for n in vars(hooks.Hooks) if not n.startswith("_")} == set(ALL) - {"setup"}


def test_an_implementation_names_only_what_it_uses(tmp_path: Path) -> None:
    class Silent:
        @hookimpl
        def evaluate(self) -> Any:
            return None  # declines to the default

    lineage = toy_session(tmp_path, evaluator=Silent()).improve()
    assert all(lineage.score(c.id) is None for c in lineage)
