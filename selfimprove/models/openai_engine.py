"""The engine that asks an OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve` and others."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from selfimprove.endpoint import CHAT, COMPLETIONS, MODELS, Endpoint, Send, read_json, read_reply, sendable, usage
from selfimprove.errors import ConfigError, ServerError
from selfimprove.identity import digest
from selfimprove.models.api import Completion, Document, Generate, Interpolate, Likelihood, Prefer, Reinforce, Score, Train
from selfimprove.models.layer import Engine, Request, Weights
from selfimprove.models.recipes import Evolve, Perturb, Recipe
from selfimprove.models.tiles import Adapter
from selfimprove.records import Part
from selfimprove.storage import storage_error

Answer = TypeVar("Answer")

_BYTES_PER_TOKEN = 4  # of English, roughly: for servers that do not count
_SEEDS = 1 << 31  # the least that servers take
_HERE = "choose engine=torch, or a strategy that learns from texts alone"
_NO_TRAINER = (
    "a server does not train or open models, and that is what was asked for; choose engine=openai_lora, "
    "which trains in this process and hands adapters to the server, or engine=torch"
)


class OpenAIEngine:
    """Generates and scores on a server, and trains in this process, where a trainer is given.

    * **Generating** asks ``/completions`` for plain prompts and ``/chat/completions`` for chat turns, with the request's own seed.
      The server tokenises, so a model whose texts begin with a mark gets it. A server that does not count tokens is charged one
      for every four bytes.
    * **Scoring** asks ``/completions`` to echo prompt and continuation with the log-probability of every token (vLLM and SGLang
      do), and the prompt alone to see where the continuation begins: at the first token that the two do not share.
    * **Training** is the trainer's, another engine on the same model. The server is handed a policy as one adapter, however many
      the policy is made of, in PEFT's format and under the policy's digest, and forgets those that were used longest ago. One that
      was restarted has lost them: it is handed them once more.

    What a server samples is not the same twice, so a run of another day differs. Every tile that was answered is kept, so that a
    run which goes on repeats nothing and promises that nothing is lost. The address is no part of any digest: the server may come
    back elsewhere. FLOPs are charged for training alone, because a server does not tell its model's size.

    Args:
        base_url: the address that ends in ``/v1``.
        model: what the server calls the model.
        api_key_env: the variable of the environment that holds the key, for a server with keys.
        max_in_flight: requests at one time.
        timeout: seconds to wait for an answer.
        retries: how often a request is sent again while the server cannot be reached, is busy or fails.
        rows: requests of a tile; what is lost at most when the server dies.
        trainer: what trains.
        adapters: a folder that this process writes and the server reads; required with a trainer.
        max_adapters: adapters that the server holds at one time.

    Raises: ConfigError, for options that cannot work; ServerError, where the server cannot be reached or has no such model.
    """

    name = "openai"

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        max_in_flight: int = 8,
        timeout: float = 300,
        retries: int = 5,
        rows: int = 64,
        trainer: Engine | None = None,
        adapters: Path | None = None,
        max_adapters: int = 8,
    ) -> None:
        for option, value in (("rows", rows), ("max_adapters", max_adapters)):
            if value < 1:
                raise ConfigError(f"engine.{option}={value} is too small; give at least 1")
        if (trainer is None) != (adapters is None):
            raise ConfigError(
                "engine.trainer and engine.adapters belong together: what is trained here is handed over in that folder; set both or none"
            )
        self.model, self.rows, self.trainer = model, rows, trainer
        self._endpoint = Endpoint("the server", "engine", base_url, model, api_key_env, max_in_flight, timeout, retries)
        self._policies = _Policies(self._endpoint, Path(adapters) if adapters is not None else None, max_adapters)
        self._root = Part("model", digest("openai", model, self._fingerprint()))

    @property
    def root(self) -> Part:
        return self._root

    @property
    def key(self) -> Mapping[str, Any]:
        return {"engine": self.name, "model": self._root.digest, "trainer": dict(self.trainer.key) if self.trainer else None}

    def settle(self, recorded: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The trainer's split; the server cuts its own work."""
        return self.trainer.settle(recorded) if self.trainer else {}

    def tiles(self, requests: Sequence[Request], weights: Weights) -> list[list[int]]:
        """Requests of one policy side by side, and no more policies in a tile than the server holds."""
        if isinstance(requests[0], Train | Reinforce):
            return self._training().tiles(requests, weights)
        of_policy: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            of_policy.setdefault(r.policy.digest, []).append(i)
        tiles: list[list[int]] = [[]]
        policies = 0
        for positions in of_policy.values():
            policies += 1
            for i in positions:
                if len(tiles[-1]) == self.rows or policies > self._policies.most:
                    tiles.append([])
                    policies = 1
                tiles[-1].append(i)
        return tiles

    # ---- generate and score ----

    def generate(self, tile: Sequence[Generate], weights: Weights) -> tuple[list[Completion], dict[str, float]]:
        if any(r.logprobs for r in tile):
            raise ConfigError(f"a server does not tell the ids of the tokens it sampled, and a policy gradient needs them; {_HERE}")

        def ask(names: Mapping[str, str]) -> list[Completion]:
            return self._endpoint.each(lambda send, r: self._completion(send, r, names[r.policy.digest]), tile)

        completions = self._asked(tile, weights, ask)
        return completions, {"generated_tokens": sum(c.tokens for c in completions)}

    def score(self, tile: Sequence[Score], weights: Weights) -> tuple[list[Likelihood], dict[str, float]]:
        if any(r.chat for r in tile):
            raise ConfigError("a server scores plain prompts only, and a chat turn was to be scored; score without chat turns, or use engine=torch")
        if any(r.ids or r.by_token or r.temperature != 1 for r in tile):
            raise ConfigError(f"a server scores texts, not sampled tokens and their entropies, and those were to be scored; {_HERE}")
        asked = [(sendable(r.prompt), sendable(r.continuation), r.policy.digest) for r in tile]
        prompts = list(dict.fromkeys(prompt for prompt, continuation, _ in asked if prompt and continuation))
        begun = dict(zip(prompts, self._endpoint.each(lambda send, prompt: self._echo(send, prompt, self.model)[0], prompts), strict=True))

        def ask(names: Mapping[str, str]) -> list[tuple[Likelihood, int]]:
            return self._endpoint.each(lambda send, a: self._likelihood(send, a[0], a[1], names[a[2]], begun.get(a[0], [])), asked)

        scored = self._asked(tile, weights, ask)
        return [likelihood for likelihood, _ in scored], {"scored_tokens": sum(tokens for _, tokens in scored)}

    def _asked(self, tile: Sequence[Generate | Score], weights: Weights, ask: Callable[[Mapping[str, str]], list[Answer]]) -> list[Answer]:
        """What `ask` makes of what the server calls each policy of a tile; once more, where the server has lost its adapters since.

        Raises: ServerError, where it loses them again.
        """
        names = self._names(tile, weights)
        try:
            return ask(names)
        except ServerError as e:
            if not self._policies.lost(e):
                raise
        self._policies.forget_all()
        names = self._names(tile, weights)
        try:
            return ask(names)
        except ServerError as e:
            if (name := self._policies.lost(e)) is None:
                raise
            raise ServerError(
                f"the server does not keep the adapter {name}, which it took twice; start it with room for engine.max_adapters="
                f"{self._policies.most} of them (vLLM: --max-cpu-loras), or lower engine.max_adapters: {e}",
                e.status,
            ) from e

    def _completion(self, send: Send, r: Generate, name: str) -> Completion:
        prompt = sendable(r.prompt)
        body: dict[str, Any] = {
            "model": name,
            **({"messages": [{"role": "user", "content": prompt}]} if r.chat else {"prompt": prompt}),
            "max_tokens": r.max_tokens,
            "temperature": r.temperature,
            "top_p": r.top_p,
            "seed": r.seed % _SEEDS,
        }
        if r.stop:
            body["stop"] = [sendable(s) for s in r.stop]
        answer = send(CHAT if r.chat else COMPLETIONS, body)
        try:
            reply = read_reply(answer)
        except ValueError as e:
            raise self._endpoint.alien(answer, "completions") from e
        text, stopped = _stopped(reply.text, r.stop)
        tokens = reply.tokens
        if tokens is None or tokens > r.max_tokens:
            tokens = r.max_tokens if reply.cut else min(r.max_tokens, 1 + len(text.encode(errors="replace")) // _BYTES_PER_TOKEN)
        return Completion(text, tokens, stopped or not reply.cut)

    def _likelihood(self, send: Send, prompt: str, continuation: str, name: str, begun: Sequence[str]) -> tuple[Likelihood, int]:
        """The likelihood, and how many tokens were scored for it. `begun` are the tokens of the prompt alone."""
        if not continuation:  # nothing is certain to follow
            return Likelihood(0.0, 0), 0
        tokens, logprobs = self._echo(send, prompt + continuation, name)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(begun, tokens, strict=False)))
        values = [x for x in logprobs[shared:] if x is not None]
        if len(values) < len(tokens) - shared:
            raise ConfigError("a text's first token follows nothing, so a server gives it no likelihood; score continuations of a prompt")
        return Likelihood(math.fsum(values), len(values)), len(tokens)

    def _echo(self, send: Send, prompt: str, name: str) -> tuple[list[str], list[float | None]]:
        """The tokens of a prompt and their log-probabilities, as the server repeats them. Raises: ConfigError, where it does not."""
        answer = send(COMPLETIONS, {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1})
        try:
            return _read_echo(answer, prompt)
        except ValueError as e:
            raise ConfigError(
                f"the server at {self._endpoint.base_url} does not repeat a prompt with the log-probabilities of its tokens, which scoring needs "
                f"({e}): {self._endpoint.clip(answer)}; use a server that does, as vLLM and SGLang do, or a reward without likelihoods"
            ) from e

    # ---- train ----

    def train(self, tile: Sequence[Train], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        return self._training().train(tile, weights)

    def reinforce(self, tile: Sequence[Reinforce], weights: Weights) -> tuple[list[tuple[Adapter, Adapter, int, list[float]]], dict[str, float]]:
        return self._training().reinforce(tile, weights)

    def prefer(self, tile: Sequence[Prefer], weights: Weights) -> tuple[list[tuple[Adapter, int, float]], dict[str, float]]:
        return self._training().prefer(tile, weights)

    def interpolate(self, tile: Sequence[Interpolate], weights: Weights) -> tuple[list[Adapter], dict[str, float]]:
        return self._training().interpolate(tile, weights)

    def derive(self, recipe: Perturb | Evolve, weights: Weights) -> Adapter:
        return self._training().derive(recipe, weights)

    def cost(self, recipe: Recipe) -> dict[str, float]:
        return self._training().cost(recipe)

    def tokens(self, document: Document) -> int:
        return self._training().tokens(document)

    def open(self, policy: Part, weights: Weights) -> contextlib.AbstractContextManager[Any]:
        """The policy as the trainer opens it. Raises: ConfigError, where there is no trainer."""
        return self._training().open(policy, weights)

    def _training(self) -> Engine:
        if self.trainer is None:
            raise ConfigError(_NO_TRAINER)
        return self.trainer

    def _fingerprint(self) -> Any:
        """What the server's list of models says about the weights, where it has such a list. Raises: ServerError."""
        try:
            try:
                answer = self._endpoint.send(MODELS, retries=0)
            except ServerError as e:
                if e.status in (404, 405, 500, 501):
                    return None
                answer = self._endpoint.send(MODELS)  # busy, or still starting
            listed = read_json(answer)
        except ValueError:
            return None
        match listed:
            case {"data": list() as entries}:
                return next((_weights(e) for e in entries if isinstance(e, Mapping) and e.get("id") == self.model), None)
            case _:
                return None

    def _names(self, tile: Sequence[Generate | Score], weights: Weights) -> dict[str, str]:
        """What the server calls each policy of a tile, all of them loaded."""
        return {p.digest: self._policies.name(p, weights) for p in dict.fromkeys(r.policy for r in tile)}


class _Policies:
    """The policies that a server holds as adapters: loaded when they are asked for, the one used longest ago forgotten for the next.

    Args:
        folder: where an adapter is written for the server to read; None where nothing trains.
        most: adapters at one time.
    """

    def __init__(self, endpoint: Endpoint, folder: Path | None, most: int) -> None:
        self.endpoint, self.folder, self.most = endpoint, folder, most
        self._names: OrderedDict[str, str] = OrderedDict()  # by policy, the one used last at the end
        above = endpoint.base_url.rstrip("/").removesuffix("/v1")
        self._routes = [("", "{adapter}"), (above, "{model}:{adapter}")]  # where vLLM and SGLang load adapters, and how they are asked for

    def name(self, policy: Part, weights: Weights) -> str:
        """What the server calls a policy. Raises: ConfigError, ServerError, StorageError, where it cannot be handed over."""
        layered = weights.layered(policy)
        adapters = (*layered.merged, *([layered.live] if layered.live else []))
        if not adapters:
            return self.endpoint.model
        if self.folder is None:
            raise ConfigError(_NO_TRAINER)
        name = policy.digest
        if name not in self._names:
            while len(self._names) >= self.most:
                self._forget(next(iter(self._names)), self.folder)
            path = self.folder / name
            self._write(path, adapters, weights)
            self._names[name] = self._load(name, path)
        self._names.move_to_end(name)
        return self._names[name]

    def lost(self, error: ServerError) -> str | None:
        """The adapter that a server knows no more; None where it refused something else. vLLM answers 404, SGLang 400; both name it."""
        return next((n for n in self._names if error.status in (400, 404) and n in str(error)), None)

    def forget_all(self) -> None:
        """Have the server forget whatever it still has, to be handed it anew."""
        while self._names and self.folder is not None:
            self._forget(next(iter(self._names)), self.folder)

    def _write(self, path: Path, adapters: Sequence[str], weights: Weights) -> None:
        """Put the adapters, as one, into a folder. Raises: StorageError."""
        from selfimprove.models.adapters import stacked, write_adapter  # torch, which engine=openai does without

        loras = [weights.lora(a) for a in adapters]
        known = [lora for lora in loras if lora is not None]
        if len(known) < len(loras):
            raise ConfigError("a server is handed adapters, and this policy's weights moved as a whole; use engine=torch")
        adapter, lora = stacked(list(zip(map(weights.adapter, adapters), known, strict=True)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".", dir=path.parent))
            try:
                write_adapter(scratch, adapter, lora, self.endpoint.model)
                scratch.chmod(0o755)  # mkdtemp makes it private, and the server may be another user
                shutil.rmtree(path, ignore_errors=True)  # a killed run's
                os.replace(scratch, path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as e:
            raise storage_error(path, e) from e

    def _load(self, name: str, path: Path) -> str:
        """Have the server load an adapter; what it is asked for by. Raises: ConfigError, where the server cannot."""
        refused: list[ServerError] = []
        for route, asked_for in self._routes:
            try:
                self._load_at(route, name, path)
            except ServerError as e:
                if e.status not in (404, 405):
                    raise
                refused.append(e)
            else:
                self._routes = [(route, asked_for)]
                return asked_for.format(model=self.endpoint.model, adapter=name)
        raise ConfigError(
            f"the server loads no adapters while it runs: {refused[0]}. Start vLLM with --enable-lora and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or SGLang with --enable-lora"
        )

    def _load_at(self, route: str, name: str, path: Path) -> None:
        body = {"lora_name": name, "lora_path": str(path)}
        try:
            self.endpoint.send(f"{route}/load_lora_adapter", body)
        except ServerError as e:
            if e.status not in (400, 409, 422):
                raise
            self._unload_at(route, name)  # a killed run may have left it
            self.endpoint.send(f"{route}/load_lora_adapter", body)

    def _unload_at(self, route: str, name: str) -> None:
        """Have the server forget an adapter; one that it does not know is forgotten already."""
        try:
            self.endpoint.send(f"{route}/unload_lora_adapter", {"lora_name": name})
        except ServerError as e:
            if e.status not in (400, 404, 422):
                raise

    def _forget(self, name: str, folder: Path) -> None:
        [(route, _)] = self._routes
        self._unload_at(route, name)
        del self._names[name]
        shutil.rmtree(folder / name, ignore_errors=True)


def _weights(entry: Mapping[str, Any]) -> Any:
    """Where the weights of a listed model are, as vLLM and SGLang tell, and their size, as llama.cpp does."""
    meta = entry.get("meta")
    return [entry.get("root"), {k: meta.get(k) for k in ("n_params", "n_vocab", "size")} if isinstance(meta, Mapping) else None]


def _read_echo(answer: str, prompt: str) -> tuple[list[str], list[float | None]]:
    """The tokens of a repeated prompt and their log-probabilities. Raises: ValueError, where they are not in the answer."""
    body = read_json(answer)
    match body:
        case {"choices": [{"text": str() as text, "logprobs": {"tokens": list() as tokens, "token_logprobs": list() as logprobs}}, *_]}:
            written = usage(body, "completion_tokens")
            count = len(tokens) - (1 if written is None else written)
            if not text.startswith(prompt) or count < 1:
                raise ValueError("the prompt is not repeated")
            if (
                len(tokens) == len(logprobs)
                and all(isinstance(t, str) for t in tokens)
                and all(x is None or (type(x) in (float, int) and abs(x) < 1e9) for x in logprobs)
            ):
                return tokens[:count], logprobs[:count]
    raise ValueError("no log-probabilities of tokens")


def _stopped(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first of these, and whether one was there: some servers leave it in."""
    cut = min((at for s in stops if (at := text.find(s)) >= 0), default=-1)
    return (text[:cut], True) if cut >= 0 else (text, False)
