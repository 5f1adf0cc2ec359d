"""The sealed test: measured once, in a process that does not train, and recorded before anyone sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfimprove import journal, records, runfolder
from selfimprove.errors import ConfigError, StorageError
from selfimprove.storage import write_json


def recorded(folder: Path) -> dict[str, Any] | None:
    """The recorded result of a run folder, or None where it was not measured yet. Raises: StorageError."""
    path = folder / runfolder.TEST
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise StorageError(f"{path} cannot be read ({e}); restore it from a copy: the sealed test is measured once") from e
    return result


def sealed_test(folder: Path, unfinished: bool = False, trust_env: bool = False, root: bool = True) -> dict[str, Any]:
    """The result of the best candidate (the latest where nothing has a score) and, unless `root` is False, of the root, recorded in the folder.

    Raises: ConfigError, where the run is not finished or its evaluator measures nothing; ResumeError.
    """
    config, session = runfolder.opened(folder, split="test", only_measure=True, trust_env=trust_env)
    try:
        lineage, run = session.lineage, session.run
        if not unfinished and session.hook.should_stop(lineage=lineage, run=run) is None:
            raise ConfigError(
                f"{folder} is not finished ({len(lineage)} rounds): `selfimprove resume {folder}` first, or measure it as it is with "
                "--unfinished; a run that has seen its test does not go on"
            )
        chosen = lineage.best() or lineage.latest
        candidates = list({c.id: c for c in ((lineage.root, chosen) if root else (chosen,))}.values())
        before = dict(run.ledger.totals)
        scores = session.hook.evaluate(candidates=candidates, trials=[], rewards=[], lineage=lineage, run=run)
        if not scores:
            raise ConfigError(f"the run's evaluator ({config.choices.get('evaluator') or 'none'}) measures nothing, so there is no test of it")
        run.ledger.tick()
        result = {
            "root": lineage.root.id,
            "candidate": chosen.id,
            "chosen": "best validation score" if lineage.best() else "latest",
            "rounds": len(lineage),
            **({"transductive": True} if run.task.transductive else {}),
            "lineage": journal.lineage_digest(folder / runfolder.JOURNAL),
            "scores": [[i, records.encode_evaluation(e)] for i, e in scores],
            "spent": {unit: total - before[unit] for unit, total in run.ledger.totals.items()},
        }
        write_json(folder / runfolder.TEST, result)
        return result
    finally:
        session.close()


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines that show a result."""
    names = {result["root"]: "root", result["candidate"]: f"candidate {result['candidate'][:12]} ({result['chosen']})"}
    for candidate_id, data in result["scores"]:
        evaluation = records.decode_evaluation(data)
        name = names.get(candidate_id, candidate_id[:12])
        if evaluation.score is None:
            yield f"{name}: not measured ({evaluation.error})"
            continue
        yield f"{name}: {evaluation.score:.4f} on {len(evaluation.per_item)} questions of the sealed test"
        for metric, value in sorted(evaluation.metrics.items()):
            yield f"  {metric}: {value:.4f}"
    if result.get("transductive"):
        yield "transductive: the run trained on these questions, without their answers"
    yield f"after {result['rounds']} rounds, lineage {result['lineage']}"
