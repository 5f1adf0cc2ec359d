"""Configuration: Hydra composes it, this module checks it and makes the objects. Only `cli.py`, `bench/launched.py` and this import Hydra."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import itertools
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin

import yaml
from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from selfimprove import discovery, plugins
from selfimprove.discovery import Option, Source, nearest
from selfimprove.errors import ConfigError, SelfImproveError
from selfimprove.hooks import ROLES

if TYPE_CHECKING:
    from selfimprove.session import Parts

SINGLE = ("strategy", *ROLES, "task", "model", "engine", "grader", "sandbox")
"""Config groups of which a run takes one option."""
SEVERAL = ("guard", "observer", "middleware")
"""Config groups of which a run takes any number: ``guard=[rounds,budget]``."""
GROUPS = (*SINGLE, *SEVERAL)
_PLAIN = ("seed", "run", "checkpoint")
_CHOICES = "choices"
_FIXED = ("strategy", "task", "model", "engine", "seed")
"""What a run's rounds rest on: `derived` does not change it."""
_MISSING = object()


@dataclass(frozen=True)
class Config:
    """A composed configuration, checked as far as it can be without making anything."""

    values: dict[str, Any]
    """Every value, resolved: what the objects are made of."""
    recorded: dict[str, Any]
    """The same for the run folder, where lookups of the environment stay as they were written, so no secret lands in a file."""
    lookups: frozenset[str] = frozenset()
    """Variables of the environment that were looked up to resolve it."""

    @property
    def choices(self) -> dict[str, Any]:
        """The option that was taken of each group."""
        return dict(self.recorded.get(_CHOICES, {}))

    @property
    def strategy(self) -> str:
        return str(self.choices.get("strategy") or "custom")

    @property
    def seed(self) -> int:
        return cast(int, self.values["seed"])

    def text(self) -> str:
        """The YAML form, for the run folder."""
        return OmegaConf.to_yaml(OmegaConf.create(self.recorded))

    @property
    def environment(self) -> list[str]:
        """Variables of the environment that it reads: by a lookup, or because an argument called ``…_env`` names one."""
        return sorted({*self.lookups, *(v for k, v in _leaves(self.values) if k.endswith("_env") and isinstance(v, str) and v)})

    def sources(self) -> list[Source]:
        """The distributions whose classes it names."""
        found = discovery.sources()
        named = [str(n["_target_"]) for _, n in discovery.nodes(self.values)]
        return [s for s in found if any(s.owns(t) for t in named)]


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that these overrides make. Raises: ConfigError, with the nearest names."""
    sources = discovery.sources()
    options = [o for s in sources for o in s.options()]
    discovery.check_unique(options)
    for override in parse(overrides):
        _check_override(override, options)
    _SearchPath.sources = sources[1:]
    Plugins.instance().register(_SearchPath)
    root = sources[0].folder
    if root is None:
        raise ConfigError("the package selfimprove.conf is not installed; run `pip install .` (or `pip install -e .`) in the repository")
    try:
        with initialize_config_dir(str(root), version_base="1.3"):
            whole = hydra_compose("config", list(overrides), return_hydra_config=True)
        taken = OmegaConf.to_container(whole.hydra.runtime.choices)
    except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as e:
        raise _explained(e, overrides, options) from e
    del whole.hydra
    OmegaConf.set_struct(whole, False)
    _anchor_model(whole)
    chosen = {g: taken[g] for g in SINGLE if isinstance(taken, dict) and taken.get(g)}
    whole[_CHOICES] = {**chosen, **{g: list(whole.get(g) or ()) for g in SEVERAL}}
    return _resolved(whole)


def jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a multirun: every combination of ``key=a,b`` and ``key=range(1,4)``."""
    axes: list[list[str]] = []
    for override in parse(overrides):
        if not override.is_sweep_override():
            axes.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            axes.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{override.input_line}: a multirun takes key=a,b or key=range(from,to)")
    return [list(job) for job in itertools.product(*axes)]


def launcher(words: Sequence[str]) -> list[str]:
    """The overrides of Hydra that choose an installed launcher and its settings: ``joblib n_jobs=2``. Raises: ConfigError."""
    name, *settings = words
    Plugins.instance()  # it imports the launchers, which register their options
    names = [n.removesuffix(".yaml") for n in ConfigStore.instance().list("hydra/launcher")]
    if name not in names:
        raise ConfigError(
            f"--launcher: no Hydra launcher called {name!r} is installed{nearest(name, names)} (installed: {', '.join(names)}); "
            "`pip install 'selfimprove[launchers]'` brings joblib, submitit_local and submitit_slurm, `pip install hydra-ray-launcher` ray"
        )
    overrides = [f"hydra/launcher={name}", *("+" * s.startswith("+") + f"hydra.launcher.{s.lstrip('+')}" for s in settings)]
    try:
        with initialize(config_path=None, version_base="1.3"):
            hydra_compose(overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(f"--launcher {' '.join(words)}: {str(e).splitlines()[0]}; after its name, write settings of {name} as key=value") from e
    return overrides


def load(path: Path) -> Config:
    """The configuration that a run folder recorded. Raises: ConfigError."""
    try:
        whole = OmegaConf.load(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror}); name a folder that `selfimprove run` made") from e
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not a configuration ({str(e).splitlines()[0]}); restore it from a copy") from e
    if not isinstance(whole, DictConfig):
        raise ConfigError(f"{path} holds a list, not a configuration; restore it from a copy")
    return _resolved(whole)


def derived(base: Config, overrides: Sequence[str]) -> Config:
    """A recorded configuration with overrides on top: a group that is named is taken anew, everything else stays as it was recorded.

    Raises: ConfigError, where an override changes what a run's rounds rest on.
    """
    parsed = parse(overrides)
    for override in parsed:
        key = str(override.key_or_group)
        if (top := key.split(".")[0]) in _FIXED:
            raise ConfigError(f"{override.input_line}: the recorded rounds rest on the run's {top}; start a new run for another one")
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: write key=value here")
    groups = {str(o.key_or_group) for o in parsed} & set(GROUPS)
    chosen = {g: c for g, c in base.choices.items() if g not in (*groups, *_FIXED) or (g == "task" and "grader" in groups)}
    words = [f"{g}={c}" for g, c in chosen.items() if g in SINGLE]
    own = [str(o.input_line) for o in parsed if str(o.key_or_group).split(".")[0] in groups]
    whole = OmegaConf.create(copy.deepcopy(base.recorded))
    whole.run.folder = None
    if groups:
        fresh = compose([*words, *own])
        for group in groups:
            whole[group] = fresh.recorded.get(group)
            whole[_CHOICES][group] = fresh.choices.get(group)
    for override in parsed:
        key = str(override.key_or_group)
        if key.split(".")[0] not in groups:
            if OmegaConf.select(whole, key, default=_MISSING) is _MISSING and not override.is_add():
                known = [k for k in _flat(base.values) if not k.endswith("_target_")]
                raise ConfigError(f"{override.input_line}: there is no {key!r}{nearest(key, known)}")
            OmegaConf.update(whole, key, override.value(), force_add=True)
    return _resolved(whole)


def build(config: Config, only_measure: bool = False) -> Parts:
    """The plugins and services of a run. What is cheap to refuse is refused before a model is opened.

    Args:
        config: what was composed or recorded.
        only_measure: leave the observers out, except the guards: nothing is going to run.

    Raises: ConfigError and AdmissionError.
    """
    from selfimprove.session import Parts  # it brings torch, which composing does not need

    values, found = config.values, discovery.sources()
    roles, observers, middleware, retention = _admitted(config, found, only_measure)
    return Parts(
        roles=roles,
        task=_one("task", values, found, required=True),
        grader=_one("grader", values, found, required=True),
        engine=_one("engine", values, found, required=True),
        sandbox=_one("sandbox", values, found),
        observers=observers,
        middleware=middleware,
        retention=retention,
        seed=config.seed,
    )


def admit(config: Config) -> None:
    """Refuse a configuration whose plugins do not go together; opens no model, task or observer. Raises: ConfigError and AdmissionError."""
    _admitted(config, discovery.sources(), only_measure=True)


def _admitted(config: Config, found: Sequence[Source], only_measure: bool) -> tuple[dict[str, Any], list[Any], list[Any], Any]:
    """The plugins of the roles, the observers, the middleware and the retention of a run, if they go together."""
    values = config.values
    roles = {role: plugin for role in ROLES if (plugin := _one(role, values, found)) is not None}
    for role in ROLES:
        if role not in roles and role not in plugins.OPTIONAL_ROLES:
            raise ConfigError(
                f"no plugin fills the role {role!r}; choose a strategy, which fills all roles (`strategy=NAME`; installed: "
                f"{_names('strategy', found)}), or an option of the role (`{role}=NAME`; installed: {_names(role, found)})"
            )
    guards = _several("guard", values, found)
    if not guards or set(values.get("guard") or ()) == {"non_finite"}:
        raise ConfigError("no guard would ever stop this run; add one, such as `guard=[rounds] guard.rounds.rounds=2`")
    observers = [*guards, *([] if only_measure else _several("observer", values, found))]
    middleware = _several("middleware", values, found)
    retention = _make("checkpoint", values["checkpoint"], found)
    plugins.admit(roles, [retention, *observers], middleware)
    plugins.check_scores(roles, observers)
    return roles, observers, middleware, retention


def check(config: Config) -> None:
    """Refuse a configuration whose classes do not exist or do not take their arguments; makes nothing. Raises: ConfigError."""
    found = discovery.sources()
    for at, node in discovery.nodes(config.values):
        check_arguments(at, located(node["_target_"], at, found), node)


def anchored(config: Config) -> Config:
    """The configuration with absolute paths, so that a run goes on from any folder.

    A path is an argument that its class annotates as `Path`. A model that is a folder has been anchored by `compose`.
    Raises: ConfigError.
    """
    values, recorded = copy.deepcopy(config.values), copy.deepcopy(config.recorded)
    found = discovery.sources()
    for (at, node), (_, written) in zip(discovery.nodes(values), discovery.nodes(recorded), strict=True):
        parameters = _signature(located(node["_target_"], at, found)).parameters
        for key, value in node.items():
            takes = parameters[key].annotation if key in parameters else None
            if isinstance(value, str) and value and Path in (takes, *get_args(takes)) and written[key] == value:
                node[key] = written[key] = str(Path(value).expanduser().absolute())  # type: ignore[index]
    return dataclasses.replace(config, values=values, recorded=recorded)


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides, parsed. Raises: ConfigError."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except (HydraException, ValueError) as e:
            key, equals, value = text.partition("=")
            remedy = f"write key=value{nearest(key, GROUPS)}" if not equals else f"quote the value: '{key}=\"{value}\"'"
            raise ConfigError(f"{text!r} is not an override; {remedy}") from e
    return parsed


def instantiate(node: Mapping[str, Any], at: str, found: Sequence[Source]) -> Any:
    """The object that a node describes, made of installed plugins' classes only.

    Raises: ConfigError, where it names anything else, or arguments that the class does not take.
    """
    for path, inner in discovery.nodes(node, at):
        check_arguments(path, located(inner["_target_"], path, found), inner)
    try:
        return hydra_instantiate(node, _convert_="all")
    except InstantiationException as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, SelfImproveError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from e
        if e.__cause__ is not None and not isinstance(e.__cause__, (TypeError, ValueError)):
            raise e.__cause__ from e
        raise ConfigError(f"{at}: {node['_target_']} cannot be made ({e.__cause__ or str(e).splitlines()[0]}); change its values in `{at}`") from e


def located(target: Any, at: str, found: Sequence[Source]) -> type[Any]:
    """The class that a `_target_` names, if an installed plugin distribution defines it.

    A run folder may come from a stranger, so nothing else is ever called: no function, no class of another library that
    happens to be reachable through a plugin's module. Raises: ConfigError.
    """
    target = str(target)
    owner = next((s for s in found if s.owns(target)), None)
    if owner is None:
        raise ConfigError(
            f"{at} names {target}, which belongs to no installed plugin ({', '.join(s.distribution for s in found)}); "
            f"install the plugin that provides it, or choose another option"
        )
    if (reason := owner.unknown_api()) is not None:
        raise ConfigError(f"{at}: the plugin {owner.distribution} {owner.version} is refused: {reason}")
    module, _, name = target.rpartition(".")
    try:
        thing = getattr(importlib.import_module(module), name, None)
    except Exception as e:  # whatever a plugin's import raises, the user's remedy is the same
        raise ConfigError(
            f"{at}: the plugin {owner.distribution} {owner.version} is broken: {module} cannot be imported "
            f"({type(e).__name__}: {e}); install it again, or choose another option"
        ) from e
    if thing is None:
        raise ConfigError(f"{at}: {discovery.missing_target(target) or target}; install a version of {owner.distribution} that has it")
    if not isinstance(thing, type) or not any(s.owns(f"{thing.__module__}.{thing.__qualname__}") for s in found):
        raise ConfigError(f"{at} names {target}, which is not a class of {owner.distribution}; _target_ takes a plugin's own classes only")
    return thing


def check_arguments(at: str, cls: type[Any], node: Mapping[str, Any]) -> None:
    """Refuse arguments that a class does not take: their names, and their types as it is annotated. Raises: ConfigError."""
    if strange := [k for k in node if str(k).startswith("_") and k not in ("_target_", "_convert_")]:
        raise ConfigError(f"{at}.{strange[0]} is not taken here; a node has `_target_` and the arguments of its class")
    signature = _signature(cls)
    named = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    rest = next((p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    given = {str(k): v for k, v in node.items() if k != "_target_" and k != "_convert_"}
    for key, value in given.items():
        parameter = named.get(key, rest)
        if parameter is None:
            raise ConfigError(f"{at}.{key}: {cls.__name__} takes no {key}{nearest(key, named)} (it takes {', '.join(named) or 'nothing'})")
        if isinstance(value, str) and value == "???":
            raise ConfigError(f"{at}.{key} has to be given: add `{at}.{key}=VALUE`")
        if not fits(value, parameter.annotation):
            raise ConfigError(
                f"{at}.{key} wants {_type_name(parameter.annotation)}; got {value!r} ({type(value).__name__}): write `{at}.{key}=VALUE`"
            )
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given:
            raise ConfigError(f"{at}.{name} is missing; {cls.__name__} needs it: add `+{at}.{name}=VALUE`")


def _signature(cls: type[Any]) -> inspect.Signature:
    try:
        return inspect.signature(cls, eval_str=True)
    except NameError:  # annotations that only a type checker can see
        return inspect.signature(cls)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value of a configuration may be passed where `annotation` stands; what it cannot judge fits."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in inner)
    if origin is Literal:
        return value in inner
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    if annotation is str:
        return isinstance(value, str)
    container = origin or annotation
    if isinstance(container, type) and container not in (object, type):
        if isinstance(value, Mapping) and "_target_" in value:
            return True
        if issubclass(container, Mapping):
            return isinstance(value, Mapping) and (len(inner) != 2 or all(fits(v, inner[1]) for v in value.values()))
        if issubclass(container, Sequence):
            element = inner[0] if inner and inner[0] is not Ellipsis else Any
            return isinstance(value, (list, tuple)) and ((len(inner) > 1 and inner[-1] is not Ellipsis) or all(fits(v, element) for v in value))
    return True


class _SearchPath(SearchPathPlugin):
    """Appends the folders of the plugins' configurations. Folders and not packages, so that no plugin is imported."""

    sources: Sequence[Source] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for source in self.sources:
            if source.folder is not None:
                search_path.append(provider=source.distribution, path=f"file://{source.folder}")


def _check_override(override: Override, options: Sequence[Option]) -> None:
    key, line = str(override.key_or_group), str(override.input_line)
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise ConfigError(f"{line}: the run folder, logging and launching are not Hydra's here; see `run.folder=` and `selfimprove run --help`")
    if key in ("choices", *(f"choices.{g}" for g in GROUPS)):
        raise ConfigError(f"{line}: choices are recorded, not given; write {key.partition('.')[2] or 'GROUP'}=NAME")
    top = key.split(".")[0].split("/")[0]
    if top not in (*GROUPS, *_PLAIN):
        known = sorted({*GROUPS, *_PLAIN})
        raise ConfigError(f"{line}: there is no {top!r}{nearest(top, known)} (known: {', '.join(known)})")
    if key not in GROUPS or override.is_delete() or override.is_sweep_override():
        return
    value = override.value()
    if value is None:
        raise ConfigError(f"{line}: write {key + '=[]' if key in SEVERAL else '~' + key} to take none")
    for name in value if isinstance(value, list) else [value]:
        names = sorted(o.name for o in options if o.group == key)
        if name in names:
            continue
        elsewhere = sorted({o.group for o in options if o.name == name and o.group in GROUPS})
        hint = f"; {name} is an option of {' and '.join(elsewhere)}" if elsewhere else nearest(str(name), names)
        installed = f"installed: {', '.join(names)}" if names else "none is installed; install a plugin that provides one"
        raise ConfigError(f"{line}: there is no {key} called {name!r}{hint} ({installed})")


def _explained(e: Exception, overrides: Sequence[str], options: Sequence[Option]) -> ConfigError:
    text = str(e)
    first = text.splitlines()[0] if text else type(e).__name__
    if "Ambiguous value" in text:
        line = text.split("'")[1]
        key, _, value = line.partition("=")
        return ConfigError(f"{line} has several values: add -m to run each, or write '{key}=[{value}]' for a list, '{key}=\"{value}\"' for text")
    for override in parse(overrides):
        key = str(override.key_or_group)
        if f"'{key}'" in first:
            known = [k for k in _keys_without(override, overrides) if not k.endswith("_target_")]
            parent, _, last = key.rpartition(".")
            own = sorted({k[len(parent) + 1 :].split(".")[0] for k in known if parent and k.startswith(parent + ".")})
            remedy = nearest(last, own) or (f"; {parent} has {', '.join(own)}" if own else nearest(key, known))
            return ConfigError(f"{override.input_line}: there is no {key!r}{remedy}")
    missing = getattr(e, "missing_cfg_file", None)
    if missing:
        group, _, name = str(missing).rpartition("/")
        names = [o.name for o in options if o.group == group]
        return ConfigError(
            f"{first.split(':')[0]} asks for {group}={name}, which is not installed{nearest(name, names)} (installed: {', '.join(names) or 'none'})"
        )
    return ConfigError(f"the configuration cannot be composed: {first}")


def _anchor_model(whole: DictConfig) -> None:
    """Make the name of a model absolute where it is a folder; of the embedded model and of a hub's it is none."""
    written = OmegaConf.to_container(whole).get("model")  # type: ignore[union-attr]
    name = written.get("name") if isinstance(written, dict) else None
    if isinstance(name, str) and name != "embedded":
        folder = Path(name).expanduser()
        if (folder / "config.json").is_file():
            whole.model.name = str(folder.absolute())


def _keys_without(bad: Override, overrides: Sequence[str]) -> list[str]:
    """The keys of the configuration that the other overrides make; none where they cannot be composed either."""
    others = [o for o in overrides if o != bad.input_line]
    if len(others) == len(overrides):
        return []
    try:
        return list(_flat(compose(others).values))
    except ConfigError:
        return []


def _flat(node: Any, at: str = "") -> Iterator[str]:
    if at:
        yield at
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{at}.{key}" if at else str(key))


def _missing(node: Any, at: str = "") -> Iterator[str]:
    """The keys of values that have to be given."""
    if node == "???":
        yield at
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _missing(value, f"{at}.{key}" if at else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _missing(value, f"{at}[{i}]")


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every value that is no mapping or list, however deep."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node


def _resolved(whole: DictConfig) -> Config:
    try:
        missing = sorted(_missing(OmegaConf.to_container(whole)))  # `OmegaConf.missing_keys` stumbles over an interpolation of a missing value
        if missing:
            raise ConfigError(f"{missing[0]} has to be given: add `{missing[0]}=VALUE`")
        values = OmegaConf.to_container(whole, resolve=True)
        lookups: set[str] = set()

        def itself(name: str, *default: Any) -> str:
            lookups.add(name)
            return f"{_LOOKUP[0]}{','.join(map(str, (name, *default)))}{_LOOKUP[1]}"

        # A lookup stands for itself while the recorded form is made, however deep the interpolation that uses it.
        OmegaConf.register_new_resolver("oc.env", itself, replace=True)
        try:
            recorded = _written(OmegaConf.to_container(whole, resolve=True))
        finally:
            OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None) or "the configuration"
        raise ConfigError(f"{key} cannot be resolved: {str(e).splitlines()[0]}") from e
    assert isinstance(values, dict)
    assert isinstance(recorded, dict)
    _check_plain(cast(dict[str, Any], values))
    return Config(cast(dict[str, Any], values), cast(dict[str, Any], recorded), frozenset(lookups))


_LOOKUP = ("\ue000", "\ue001")  # private characters, around the name of a variable of the environment


def _written(node: Any) -> Any:
    """The form of a resolved value that resolves to it again."""
    if isinstance(node, dict):
        return {key: _written(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_written(value) for value in node]
    if isinstance(node, str):
        escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", node)
        return escaped.replace(_LOOKUP[0], "${oc.env:").replace(_LOOKUP[1], "}")
    return node


def _check_plain(values: dict[str, Any]) -> None:
    known = {*GROUPS, *_PLAIN, _CHOICES}
    for key in values:
        if key not in known:
            raise ConfigError(f"there is no {key!r} in a configuration{nearest(str(key), known)} (known: {', '.join(sorted(known))})")
    if not fits(values.get("seed"), int) or values["seed"] < 0:
        raise ConfigError(f"seed wants a whole number from 0; got {values.get('seed')!r}: write seed=3")
    run = values.get("run")
    if not isinstance(run, dict) or set(run) != {"folder"} or not fits(run["folder"], str | None):
        raise ConfigError(f"run wants a folder and nothing else; got {run!r}: write run.folder=PATH")
    if not isinstance(values.get("checkpoint"), dict):
        raise ConfigError(f"checkpoint wants every, last, best and spaced; got {values.get('checkpoint')!r}")


def _make(at: str, node: Any, found: Sequence[Source]) -> Any:
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(f"{at} names no class: it needs `_target_` and the arguments of the class, got {node!r}")
    return instantiate(node, at, found)


def _one(group: str, values: Mapping[str, Any], found: Sequence[Source], required: bool = False) -> Any:
    node = values.get(group)
    if node is None or (isinstance(node, Mapping) and "_target_" in node and node["_target_"] is None):
        if required:
            raise ConfigError(f"a run needs a {group}; choose one with `{group}=NAME` (installed: {_names(group, found)})")
        return None
    return _make(group, node, found)


def _several(group: str, values: Mapping[str, Any], found: Sequence[Source]) -> list[Any]:
    node = values.get(group) or {}
    if not isinstance(node, Mapping):
        raise ConfigError(f"{group} wants named options; got {node!r}: write {group}=[NAME,NAME]")
    if "_target_" in node:
        return [_make(group, node, found)]
    return [_make(f"{group}.{name}", inner, found) for name, inner in node.items()]


def _names(group: str, found: Sequence[Source]) -> str:
    return ", ".join(sorted(o.name for s in found for o in s.options() if o.group == group)) or "none"


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in get_args(annotation))
    if annotation in _TYPES:
        return _TYPES[annotation]
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation).replace("typing.", "")


_TYPES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null", None: "null"}
