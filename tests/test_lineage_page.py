"""The lineage page: what it says of a run, that nothing a model wrote escapes, and that a browser draws a thousand candidates."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from selfimprove.cli import main
from selfimprove.journal import write_line, write_root
from selfimprove.ledger import Ledger
from selfimprove.payloads import Patch, Text
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Round, Trial, encode_round
from selfimprove.report import history, lineage_page
from selfimprove.report.lineage import chain, nodes
from selfimprove.testing import toy_session

EVIL = "</script><script>document.title='escaped'</script><img src=x onerror=alert(1)>\u2028"


def grown(count: int, text: str = "x") -> Lineage:
    """A lineage of `count` candidates besides the root, two in a round."""
    lineage = Lineage(Candidate.root())
    while lineage.size <= count:
        known = list(lineage)
        parents = [known[(7 * lineage.size + i) % len(known)] for i in range(2)]
        trials = [Trial(Edit((p.id,), Patch(text, diagnosis="why")), p.derive(lineage.size, i)) for i, p in enumerate(parents)]
        scores = [(t.candidate.id, Evaluation((lineage.size % 10) / 10, per_item={"a": float(len(lineage) % 2), "b": 0.5})) for t in trials]
        lineage = lineage + Round(
            tuple(p.id for p in parents), tuple(trials), tuple(e for _, e in scores), tuple(t.candidate for t in trials), tuple(scores)
        )
    return lineage


def written(lineage: Lineage, folder: Path) -> Path:
    write_root(folder / "journal.jsonl", lineage.root, Ledger())
    for r in lineage.rounds:
        write_line(folder / "journal.jsonl", {"round": encode_round(r), "labelled": [], "ledger": Ledger().snapshot()})
    return folder


def test_a_node_says_what_was_gained_and_lost() -> None:
    lineage = grown(6)
    found = nodes(lineage)
    assert [n["id"] for n in found] == [c.id for c in lineage]
    assert found[0]["parent"] == -1
    assert all(0 <= n["parent"] < i for i, n in enumerate(found) if i)
    assert any(n["gained"] == ["a"] for n in found) or any(n["lost"] == ["a"] for n in found)
    assert sum(n["best"] for n in found) == 1


def test_a_chain_goes_from_the_root_to_the_candidate() -> None:
    lineage = grown(20)
    steps = chain(lineage, lineage.latest.id)
    assert steps[-1][0] == lineage.latest.id
    assert lineage[steps[0][0]].parents == (lineage.root.id,)
    assert chain(lineage, lineage.root.id) == []


def test_what_a_model_wrote_stays_data(tmp_path: Path) -> None:
    page = lineage_page(history(written(grown(4, EVIL), tmp_path)))
    assert page.count("</script>") == 2, "the page's own two"
    embedded = re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1])["nodes"][1]["edit"] == EVIL
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_the_command_writes_a_page_and_prints_a_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_session(tmp_path / "run", rounds=1).improve()
    assert main(["show", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    folder = written(grown(4, "+new line"), tmp_path)
    assert main(["show", str(folder), "latest"]) == 0
    assert "+new line" in capsys.readouterr().out
    assert main(["show", str(folder), "nobody"]) == 2


def test_other_payloads_are_shown_too(tmp_path: Path) -> None:
    root = Candidate.root()
    trial = Trial(Edit((root.id,), Text("a text")), root.derive(1))
    lineage = Lineage(root) + Round((root.id,), (trial,), (Evaluation(1.0),), (trial.candidate,))
    assert nodes(lineage)[1]["edit"] == "a text"
    assert nodes(lineage)[1]["score"] is None


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_draws_a_thousand_candidates(tmp_path: Path) -> None:
    assert BROWSER is not None
    page = tmp_path / "page.html"
    page.write_text(lineage_page(history(written(grown(1000, EVIL), tmp_path))))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", f"{page.as_uri()}#5"], capture_output=True, text=True, timeout=60)
    drawn = done.stdout
    assert drawn.count("<circle") == 1001
    assert "1001 candidates" in drawn
    assert 'class="chosen' in drawn or "chosen" in drawn.split("<aside")[0]
    assert "<h3>edit</h3>" in drawn
    assert "<title>Lineage of" in drawn, "no script of the edit ran"
