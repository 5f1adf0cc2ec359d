"""Admission: which object fills which role, and every reason to refuse before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pluggy

from selfimprove.contracts import Contracts
from selfimprove.defaults import Defaults
from selfimprove.deprecation import deprecated
from selfimprove.errors import AdmissionError
from selfimprove.hooks import DEPRECATED, PROJECT, ROLES, Observer, Preparation, new_manager
from selfimprove.records import Candidate

OPTIONAL_ROLES = ("updater", "evaluator")


def admit(roles: Mapping[str, Any], observers: Sequence[Any] = (), middleware: Sequence[Any] = ()) -> pluggy.PluginManager:
    """A manager with one plugin per role, wrappers around them, observers beside them and the contracts outermost.

    Raises: AdmissionError, naming the plugin, the hook and the remedy.
    """
    for role in ROLES:
        if roles.get(role) is None and role not in OPTIONAL_ROLES:
            raise AdmissionError(f"no plugin fills the role {role!r}; choose one with `{role}=NAME` (`selfimprove list` shows them)")
    manager = new_manager()
    manager.register(Defaults(), "defaults")
    for role, plugin in roles.items():
        if plugin is not None:
            _check_role(role, plugin)
            _register(manager, plugin, role)
    _check_payloads(roles)
    for plugin in (*roles.values(), *middleware, *observers):
        if callable(check := getattr(plugin, "check_roles", None)):
            check(roles)
    for i, wrapper in enumerate(middleware):
        _check_wrapper(wrapper)
        _register(manager, wrapper, f"middleware.{i}")
    for i, observer in enumerate(observers):
        _check_hooks(observer, {*_hooks_of(Observer)}, "an observer")
        _register(manager, observer, f"observer.{i}")
    if not any("should_stop" in _implemented(o) for o in observers):
        raise AdmissionError("no guard would ever stop this run; add one, such as `guard=[rounds] guard.rounds.rounds=2`")
    manager.register(Contracts(), "contracts")
    manager.check_pending()
    return manager


def check_scores(roles: Mapping[str, Any], observers: Iterable[Any]) -> None:
    """Refuse plugins that need scores where no evaluator gives any. Raises: AdmissionError."""
    if roles.get("evaluator") is not None:
        return
    for plugin, place in (*((p, r) for r, p in roles.items()), *((o, "guard") for o in observers)):
        if getattr(plugin, "needs_scores", False):
            raise AdmissionError(
                f"{_name(plugin)} ({place}) needs scores, and no evaluator gives any; choose one with `evaluator=NAME`, or "
                "`evaluator=reward_is_score` where the reward is the benchmark"
            )


def _check_role(role: str, plugin: Any) -> None:
    if role not in ROLES:
        raise AdmissionError(f"there is no role {role!r}; the roles are {', '.join(ROLES)}")
    own = _hooks_of(ROLES[role])
    _check_hooks(plugin, {*own, *_hooks_of(Preparation)}, f"the role {role!r}")
    required = own[0]
    if required not in _implemented(plugin):
        fits = [r for r, spec in ROLES.items() if set(_hooks_of(spec)) & _implemented(plugin)]
        hint = f"it is made for the role {fits[0]!r}" if fits else f"mark its `{required}` method with @hookimpl"
        raise AdmissionError(f"{_name(plugin)} does not implement `{required}`, which the role {role!r} needs; {hint}")


def _check_hooks(plugin: Any, allowed: set[str], place: str) -> None:
    strange = sorted(_implemented(plugin) - allowed)
    if strange:
        owner = next((r for r, spec in ROLES.items() if strange[0] in _hooks_of(spec)), None)
        remedy = f"use it as the {owner}" if owner else f"known hooks are {', '.join(sorted(allowed))}"
        raise AdmissionError(f"{_name(plugin)} implements `{strange[0]}`, which {place} does not have; {remedy}")


def _check_wrapper(plugin: Any) -> None:
    known = {h for spec in ROLES.values() for h in _hooks_of(spec)} | {*_hooks_of(Preparation)}
    _check_hooks(plugin, known, "middleware")
    for hook in _implemented(plugin):
        options = getattr(getattr(plugin, hook), f"{PROJECT}_impl")
        if not options.get("wrapper"):
            raise AdmissionError(f"middleware {_name(plugin)}: `{hook}` is no wrapper; mark it @hookimpl(wrapper=True), or give it a role")


def steered_by_labels(roles: Mapping[str, Any], observers: Sequence[Any]) -> list[str]:
    """What trains, selects or stops by labels, by name and place; a run where nothing does is label-free.

    A selector or guard that goes by scores goes by labels where the evaluator reads them. An evaluator alone, or a monitor, steers nothing.
    """
    by_score = getattr(roles.get("evaluator"), "uses_labels", False)
    places = [
        *((roles[r], r) for r in ROLES if r != "evaluator" and r in roles),
        *((o, "guard") for o in observers if "should_stop" in _implemented(o)),
    ]
    return [
        f"{_name(plugin)} ({place})"
        for plugin, place in places
        if getattr(plugin, "uses_labels", False) or (by_score and getattr(plugin, "needs_scores", False))
    ]


def check_needs(roles: Mapping[str, Any], root: Candidate) -> None:
    """Raises: AdmissionError, where a role reads a part that candidates of this run do not have."""
    for role, plugin in roles.items():
        if missing := sorted(set(getattr(plugin, "needs", ())) - set(root.parts)):
            raise AdmissionError(
                f"{_name(plugin)} ({role}) reads the part {missing[0]!r} of a candidate, and those of {_name(roles['editor'])} (editor) have only "
                f"{', '.join(sorted(root.parts))}; "
                f"choose an editor that makes it, or another {role}"
            )


def check_transductive(roles: Mapping[str, Any]) -> None:
    """Raises: AdmissionError, where a role that learns reads labels, and the task trains on sealed questions."""
    for role in ("editor", "rewarder", "updater"):
        if getattr(roles.get(role), "uses_labels", False):
            raise AdmissionError(
                f"{_name(roles[role])} ({role}) reads labels, but task.transductive=true trains on sealed questions, whose answers stay sealed; "
                f"choose a {role} that needs no labels, or task.transductive=false"
            )


def _check_payloads(roles: Mapping[str, Any]) -> None:
    editor = roles["editor"]
    produced: tuple[type, ...] | None = getattr(editor, "produces", None)
    if produced is None:
        return
    for role in ("rewarder", "updater"):
        plugin = roles.get(role)
        consumed: tuple[type, ...] | None = getattr(plugin, "consumes", None)
        if consumed is not None and not any(issubclass(p, c) for p in produced for c in consumed):
            raise AdmissionError(
                f"{_name(editor)} (editor) produces {_types(produced)}, but {_name(plugin)} ({role}) consumes "
                f"{_types(consumed)}; choose another editor or {role}"
            )


def _register(manager: pluggy.PluginManager, plugin: Any, name: str) -> None:
    if not _implemented(plugin):
        raise AdmissionError(f"{_name(plugin)} ({name}) implements no hook; mark its methods with @selfimprove.hookimpl")
    if manager.is_registered(plugin):  # one object may fill several roles
        return
    for (hook, argument), instead in DEPRECATED.items():
        if hook in _implemented(plugin) and argument in pluggy._hooks.varnames(getattr(plugin, hook))[0]:
            deprecated(f"the argument `{argument}` of `{hook}`, which {_name(plugin)} names,", instead)
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as e:
        raise AdmissionError(f"{_name(plugin)} ({name}) does not fit its hook: {str(e).splitlines()[-1]}; see selfimprove/hooks.py") from e


def _implemented(plugin: Any) -> set[str]:
    return {n for n in dir(type(plugin)) if not n.startswith("__") and hasattr(getattr(plugin, n, None), f"{PROJECT}_impl")}


def _hooks_of(spec: type) -> list[str]:
    return [n for n, f in vars(spec).items() if hasattr(f, f"{PROJECT}_spec")]


def _types(classes: Iterable[type]) -> str:
    return ", ".join(c.__name__ for c in classes)


def _name(plugin: Any) -> str:
    return type(plugin).__name__
