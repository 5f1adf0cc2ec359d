"""The commands, as a user types them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from selfimprove import discovery, runfolder
from selfimprove.cli import clean, main
from selfimprove.journal import lineage_digest

TOY = "strategy=toy"

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """`typed("run", …)`: exit code, output and errors, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def in_a_shell(*argv: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-c", "import sys; from selfimprove.cli import main; sys.exit(main())", *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def distribution(root: Path, name: str, options: dict[str, str], code: str = "", version: str = "1.0", requires: str = "") -> Path:
    """A plugin distribution, as an installer leaves it in site-packages."""
    package = name.replace("-", "_")
    info = root / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    more = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
    (info / "entry_points.txt").write_text(f"[selfimprove.conf]\n{package} = {package}.conf\n")
    (root / package / "conf").mkdir(parents=True)
    (root / package / "__init__.py").write_text(dedent(code))
    (root / package / "conf" / "__init__.py").write_text("")
    for place, text in options.items():
        file = root / package / "conf" / f"{place}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(dedent(text))
    return root


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what its packages left behind is forgotten afterwards."""
    folder = tmp_path_factory.mktemp("site")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for module in set(sys.modules) - before:
        if (getattr(sys.modules[module], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[module]


MINE = {
    "strategy/mine": """\
        # @package _global_
        # My own strategy.
        defaults:
          - override /editor: mine
          - override /rewarder: toy
          - override /task: toy
          - override /engine: toy
        """,
    "editor/mine": "# My own editor.\n_target_: mine.Mine\nedits: 2\n",
}
MINE_CODE = """\
    from selfimprove.testing import NoopEditor, ToyEditor

    class Mine(ToyEditor):
        def __init__(self, edits: int) -> None:
            super().__init__(edits)

        def expected(self, run) -> dict[str, float]:
            return {"generated_tokens": 1000.0 * self.edits}
    """


# ---- run ----


def test_a_run_ends_with_the_table_the_digest_the_folder_and_the_reason(typed: Shell) -> None:
    code, out, err = typed("run", TOY)
    assert code == 0, err
    [folder] = Path("runs").iterdir()
    assert folder.name.endswith("_toy_s0")
    assert "after round 2" in out
    assert "stopped because all 2 rounds are done" in out
    assert f"lineage {lineage_digest(folder / 'journal.jsonl')}" in out
    assert f"run folder {folder}" in out
    assert {"config.yaml", "versions.json", "identity.json", "journal.jsonl"} <= {p.name for p in folder.iterdir()}
    made = json.loads((folder / "versions.json").read_text())
    assert made["packages"]["selfimprove"] == discovery.version_of("selfimprove")
    assert made["packages"]["torch"]
    assert made["configuration"]["editor.edits"] == 2


def test_the_same_command_twice_gives_the_same_lineage_in_two_folders(typed: Shell) -> None:
    for _ in range(2):
        assert typed("run", TOY, "seed=3", "guard.rounds.rounds=1")[0] == 0
    folders = list(Path("runs").iterdir())
    assert len(folders) == 2
    assert len({lineage_digest(f / "journal.jsonl") for f in folders}) == 1


def test_roles_are_swapped_by_overrides(typed: Shell) -> None:
    code, _, err = typed("run", TOY, "selector=best", "updater.keep=2", "run.folder=one")
    assert code == 2
    assert "there is no 'updater.keep'" in err
    code, out, err = typed("run", TOY, "selector=best", "evaluator=reward_is_score", "~updater", "guard.rounds.rounds=1", "run.folder=one")
    assert code == 0, err
    assert "run folder one" in out


def test_a_run_folder_is_never_overwritten(typed: Shell, tmp_path: Path) -> None:
    assert typed("run", TOY, "run.folder=mine")[0] == 0
    before = (tmp_path / "mine/journal.jsonl").read_bytes()
    code, _, err = typed("run", TOY, "run.folder=mine", "seed=1")
    assert code == 2
    assert "selfimprove resume mine" in err
    assert (tmp_path / "mine/journal.jsonl").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    assert "holds other files" in typed("run", TOY, "run.folder=other")[2]
    assert "is a file" in typed("run", TOY, "run.folder=other/file")[2]
    assert typed("run", TOY, "run.folder=other/file/below")[0] == 2


def test_a_run_may_begin_where_one_was_killed_before_it_began(typed: Shell, tmp_path: Path) -> None:
    """`versions.json` is written first, each file through a temporary one."""
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "versions.json").write_text("{}")
    (tmp_path / "early" / ".config.yaml.17.tmp").write_text("sel")
    assert "start one in it" in typed("resume", "early")[2]
    assert typed("run", TOY, "run.folder=early")[0] == 0
    assert typed("run", TOY, "run.folder=straight")[0] == 0
    assert lineage_digest(tmp_path / "early/journal.jsonl") == lineage_digest(tmp_path / "straight/journal.jsonl")


def test_a_refused_run_leaves_no_folder(typed: Shell, tmp_path: Path) -> None:
    for wrong in ("evaluator=none", "editor.edits=two", "strategy=tog", "task.people=x"):
        assert typed("run", TOY, "selector=best", wrong)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_multirun_gives_every_job_its_own_folder(typed: Shell) -> None:
    code, out, err = typed("run", "-m", TOY, "seed=0,1", "guard.rounds.rounds=1")
    assert code == 0, err
    assert sorted(f.name[-2:] for f in Path("runs").iterdir()) == ["s0", "s1"]
    assert "job 2 of 2" in out
    code, out, err = typed("run", TOY, "seed=0,1", "-m", "guard.rounds.rounds=1", "run.folder=sweep")
    assert code == 0, err
    assert sorted(p.name for p in Path("sweep").iterdir()) == ["0", "1"]


def test_a_multirun_starts_nothing_while_one_job_is_wrong(typed: Shell, tmp_path: Path) -> None:
    code, _, err = typed("run", "-m", TOY, "editor.edits=1,none")
    assert code == 2
    assert "editor.edits wants a whole number" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(discovery.version_of("selfimprove-seal") is None, reason="the SEAL plugin is not installed")
@pytest.mark.parametrize(
    "overrides",
    [
        "strategy=seal",
        "strategy=seal rewarder=log_likelihood updater.keep=2 seed=3",
        "-m strategy=seal seed=0,1",
        "strategy=seal task=squad task.path=squad.json",
        "strategy=seal model=hf model.name=org/name",
        "strategy=seal_paper",
        "strategy=seal_tools guard=[rounds,budget] guard.budget.labels=500",
    ],
)
def test_the_documented_overrides_compose(typed: Shell, overrides: str) -> None:
    code, out, err = typed("run", *overrides.split(), "--cfg", "job")
    assert code == 0, err
    assert "selfimprove_seal" in out


def test_cfg_prints_and_starts_nothing(typed: Shell, tmp_path: Path) -> None:
    code, out, _ = typed("run", TOY, "seed=7", "--cfg", "job")
    assert code == 0
    assert "seed: 7" in out
    assert "_target_: selfimprove.testing.ToyEditor" in out
    assert list(tmp_path.iterdir()) == []


def test_a_role_without_a_plugin_names_the_strategies(typed: Shell) -> None:
    code, _, err = typed("run")
    assert code == 2
    assert "choose a strategy" in err
    assert "toy" in err


def test_a_plugin_in_the_wrong_role_is_named(typed: Shell) -> None:
    code, _, err = typed("run", TOY, "editor._target_=selfimprove.testing.ToyRewarder", "~editor.edits")
    assert code == 2
    assert "ToyRewarder implements `reward`" in err
    assert "use it as the rewarder" in err


def test_a_missing_file_is_named(typed: Shell) -> None:
    code, _, err = typed("run", TOY, "task=squad", "task.path=nowhere.json", "engine=scripted")
    assert code == 2
    assert "nowhere.json does not exist" in err


# ---- resume ----


def test_a_stopped_run_resumes_to_the_lineage_of_one_that_was_not(typed: Shell, tmp_path: Path) -> None:
    assert typed("run", TOY, "run.folder=whole")[0] == 0
    assert typed("run", TOY, "run.folder=cut")[0] == 0
    journal = tmp_path / "cut/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]) + '{"schema": 1, "round"')  # a kill in mid-line
    code, out, err = typed("resume", "cut")
    assert code == 0, err
    assert "resuming cut after 1 rounds" in out
    assert lineage_digest(journal) == lineage_digest(tmp_path / "whole/journal.jsonl")


def test_resume_refuses_what_differs_and_names_it(typed: Shell, tmp_path: Path) -> None:
    assert typed("run", TOY, "run.folder=a", "guard.rounds.rounds=1")[0] == 0
    config, versions = tmp_path / "a/config.yaml", tmp_path / "a/versions.json"
    original = config.read_text(), versions.read_text()

    config.write_text(original[0].replace("edits: 2", "edits: 3"))
    code, _, err = typed("resume", "a")
    assert code == 2
    assert "editor.edits: the run was made with 2, config.yaml now says 3" in err
    config.write_text(original[0])

    made = json.loads(original[1])
    made["packages"] = {**made["packages"], "torch": "1.0", "gone-plugin": "0.3"}
    versions.write_text(json.dumps(made))
    code, _, err = typed("resume", "a")
    assert code == 2
    assert "torch: the run was made with 1.0" in err
    assert "gone-plugin: the run was made with 0.3, installed is nothing" in err

    for hostile in ("", "[]", "{}", '{"packages": 3, "configuration": []}', "\x00"):
        versions.write_text(hostile)
        assert typed("resume", "a")[0] == 2
    versions.write_text(original[1])
    for hostile in ("", "- 1", "{", "seed: [", "a: ${b}", "editor: {_target_: os.abort}", "\x00"):
        config.write_text(hostile)
        code, _, err = typed("resume", "a")
        assert code == 2
        assert err.startswith("error:")


def test_a_run_goes_on_from_another_folder(typed: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"title": f"T{i}", "context": f"Passage {i}.", "questions": [{"question": f"Q{i}?", "answer": str(i)}]} for i in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    sizes = ["task.train=2", "task.validation=2", "task.test=2"]
    code, _, err = typed("run", TOY, "task=squad", "task.path=data.json", *sizes, "engine=scripted", "run.folder=a")
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = typed("resume", "../a")
    assert code == 0, err


def test_a_key_goes_to_a_recorded_address_only_when_told(typed: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = ["grader=judge", "grader.base_url=http://127.0.0.1:9/v1", "grader.model=m", "grader.retries=0", TOY]
    assert typed("run", *judge, "run.folder=a")[0] == 2  # nobody listens there
    for command in (["resume", "a"], ["eval", "a"], ["export", "a", "root", "out"]):
        Path("a/journal.jsonl").touch()
        code, _, err = typed(*command)
        assert code == 2
        for text in ("OPENAI_API_KEY", "http://127.0.0.1:9/v1", "--trust-env"):
            assert text in err
    code, _, err = typed("resume", "a", "--trust-env")
    assert code == 2
    assert "cannot be reached" in err


def test_resume_of_another_model_or_task_is_refused(typed: Shell, tmp_path: Path) -> None:
    assert typed("run", TOY, "run.folder=a", "guard.rounds.rounds=1")[0] == 0
    identity = tmp_path / "a/identity.json"
    recorded = json.loads(identity.read_text())
    identity.write_text(json.dumps({**recorded, "model": "another"}))
    code, _, err = typed("resume", "a")
    assert code == 2
    assert "model: the run has another" in err


def test_a_folder_that_is_no_run_is_refused_by_every_command(typed: Shell, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["resume"], ["show"], ["eval"], ["export", "best", "out"]):
        for folder in ("empty", "missing"):
            code, _, err = typed(command[0], folder, *command[1:])
            assert code == 2
            assert folder in err


# ---- list, help, completion, doctor ----


def test_help_and_list_name_every_option_and_its_distribution(typed: Shell) -> None:
    everything = [o for s in discovery.sources() for o in s.options()]
    for argv in (["list"], ["run", "--help"], ["--help"]):
        code, out, _ = typed(*argv)
        assert code == 0
        for option in everything:
            assert any(line.split()[:2] == [option.name, option.source.distribution] for line in out.splitlines()), option


def test_list_of_a_group_and_of_a_wrong_one(typed: Shell) -> None:
    code, out, _ = typed("list", "strategy")
    assert code == 0
    assert "toy" in out
    assert "editor:" not in out
    code, _, err = typed("list", "strategi")
    assert code == 2
    assert "did you mean strategy?" in err


def test_listing_imports_neither_torch_nor_hydra_nor_any_plugin(tmp_path: Path, site: Path) -> None:
    distribution(site, "mine", MINE, "raise RuntimeError('imported')")
    program = "import sys; from selfimprove.cli import main; main({}); print('LOADED', sorted({{m.split('.')[0] for m in sys.modules}}))"
    for argv in ("['list']", "['completion', 'bash']"):
        done = subprocess.run(
            [sys.executable, "-c", program.format(argv)], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        loaded = set(done.stdout.rpartition("LOADED")[2].replace("'", "").strip(" []\n").split(", "))
        assert not loaded & {"torch", "transformers", "hydra", "omegaconf", "mine", "selfimprove_seal"}
        assert "mine" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(typed: Shell, shell: str) -> None:
    code, out, _ = typed("completion", shell)
    assert code == 0
    for word in ("resume", "doctor", TOY, "guard=rounds"):
        assert word in out


def test_bash_completes_after_the_equals_sign(typed: Shell, tmp_path: Path) -> None:
    (tmp_path / "complete").write_text(typed("completion", "bash")[1])
    asks = 'source complete; COMP_LINE="selfimprove run strategy=to"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(selfimprove run strategy = to);'
    done = subprocess.run(["bash", "-c", asks + ' COMP_CWORD=4; _selfimprove; echo "${COMPREPLY[@]}"'], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["toy"], done.stderr


def test_doctor_gives_a_fix_for_every_row_that_is_not_in_order(typed: Shell) -> None:
    code, out, _ = typed("doctor")
    lines = out.splitlines()
    assert code == (1 if any(line.startswith("fail") for line in lines) else 0)
    for i, line in enumerate(lines):
        if line.startswith(("note", "fail")):
            assert lines[i + 1].strip().startswith("fix: ")
    for name in ("python", "torch", "processor", "cores", "memory", "wandb"):
        assert any(line[5:].startswith(name) for line in lines)


def test_unknown_commands_and_flags_exit_with_2(typed: Shell) -> None:
    for argv in (["rnu"], [], ["run", "--fast"], ["list", "--all"], ["completion", "tcsh"], ["resume"], ["run", "--cfg", "all"]):
        code, _, err = typed(*argv)
        assert code == 2
        assert "usage:" in err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_what_the_system_refuses_is_no_traceback(typed: Shell, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuses(*args: object) -> None:
        raise OSError(number, os.strerror(number), "some/folder")

    monkeypatch.setattr("selfimprove.cli._catalogue", refuses)
    code, _, err = typed("list")
    assert code == 2
    assert os.strerror(number) in err
    assert "some/folder" in err


def test_nothing_writes_over_the_terminal() -> None:
    assert clean("a\x1b[2Jb\r\nc\x00\u202e") == "a�[2Jb�\nc��"


# ---- plan, eval, show, export ----


def test_plan_measures_and_starts_nothing(typed: Shell, tmp_path: Path, site: Path) -> None:
    code, out, err = typed("plan", TOY)
    assert code == 0, err
    for text in ("generate:", "score:", "train:", "tokens per second", "nothing was started", "2 train and 2 validation items", "model scripted, "):
        assert text in out
    distribution(site, "mine", MINE, MINE_CODE)
    code, out, err = typed("plan", "strategy=mine", "guard.rounds.rounds=3")
    assert code == 0, err
    assert "2,000" in out
    assert "expected for 3 rounds" in out
    assert "not counted, because they do not tell: rewarder" in out
    assert list(tmp_path.iterdir()) == []
    assert typed("plan", "strategy=tog")[0] == 2


def test_the_sealed_test_is_measured_once_and_recorded_before_it_is_shown(typed: Shell, tmp_path: Path) -> None:
    assert typed("run", TOY, "run.folder=a")[0] == 0
    code, first, err = typed("eval", "a")
    assert code == 0, err
    assert "root: " in first
    assert "best validation score" in first
    assert "6 questions of the sealed test" in first
    recorded = (tmp_path / "a/test.json").read_bytes()
    assert [i for i, _ in json.loads(recorded)["scores"]] == [json.loads(recorded)["root"], json.loads(recorded)["candidate"]]
    code, second, _ = typed("eval", "a")
    assert code == 0
    assert "happens once" in second
    assert second.endswith(first)
    assert (tmp_path / "a/test.json").read_bytes() == recorded
    code, _, err = typed("resume", "a")
    assert code == 2
    assert "sealed test" in err
    (tmp_path / "a/test.json").write_text("{")
    assert "restore it from a copy" in typed("eval", "a")[2]


def test_an_unfinished_run_is_not_tested_by_accident(typed: Shell, tmp_path: Path) -> None:
    assert typed("run", TOY, "run.folder=a")[0] == 0
    journal = tmp_path / "a/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    code, _, err = typed("eval", "a")
    assert code == 2
    assert "is not finished" in err
    assert not (tmp_path / "a/test.json").exists()
    assert typed("eval", "a", "--unfinished")[0] == 0


def test_a_run_without_an_evaluator_has_no_test(typed: Shell, tmp_path: Path) -> None:
    assert typed("run", TOY, "evaluator=reward_is_score", "run.folder=a")[0] == 0
    code, _, err = typed("eval", "a")
    assert code == 2
    assert "reward_is_score" in err
    assert not (tmp_path / "a/test.json").exists()


def test_show_prints_rounds_edits_ledger_and_lineage(typed: Shell) -> None:
    assert typed("run", TOY, "run.folder=a")[0] == 0
    code, out, err = typed("show", "a")
    assert code == 0, err
    for text in ("Ledger", "Lineage", "root", "best"):
        assert text in out


def test_candidates_are_named_by_word_or_by_the_beginning_of_an_id(typed: Shell) -> None:
    assert typed("run", TOY, "run.folder=a")[0] == 0
    _, session = runfolder.opened(Path("a"), only_measure=True)
    session.close()
    lineage = session.lineage
    assert runfolder.candidate(lineage, "root") == lineage.root
    assert runfolder.candidate(lineage, "best") == lineage.best()
    assert runfolder.candidate(lineage, lineage.latest.id[:10]) == lineage.latest
    for wrong in ("", "zz", "worst"):
        code, _, err = typed("export", "a", wrong, "out")
        assert code == 2
        assert err


# ---- plugins ----


def test_a_plugin_is_listed_and_runs_under_its_name(tmp_path: Path, site: Path) -> None:
    distribution(site, "mine", MINE, MINE_CODE, version="2.5")
    done = in_a_shell("list", "strategy", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    assert "mine 2.5" in " ".join(done.stdout.split())
    done = in_a_shell("run", "strategy=mine", "run.folder=a", "guard.rounds.rounds=1", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a/versions.json").read_text())["packages"]["mine"] == "2.5"
    done = in_a_shell("resume", "a", cwd=tmp_path)  # uninstalled
    assert done.returncode == 2
    assert "mine" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_plugins_with_one_option_name_are_refused_by_name(typed: Shell, site: Path) -> None:
    distribution(site, "mine", MINE, MINE_CODE)
    distribution(site, "yours", {"editor/mine": "_target_: yours.Thing\n"}, "class Thing: ...")
    code, _, err = typed("run", TOY)
    assert code == 2
    for text in ("editor=mine", "mine", "yours", "uninstall"):
        assert text in err
    code, out, _ = typed("list", "editor")
    assert code == 0
    assert out.count("BROKEN: offered by mine and by yours") == 2


@pytest.mark.parametrize(
    ("options", "code", "requires", "reason"),
    [
        ({"editor/bad": "_target_: bad.Missing\n"}, "class Missin: ...", "", "module bad has no Missing; did you mean Missin?"),
        ({"editor/bad": "_target_: bad.deep.Thing\n"}, "", "", "there is no module bad.deep"),
        ({"editor/bad": "_target_: [\n"}, "", "", "is not YAML"),
        ({"editor/bad": "_target_: bad.Thing\n"}, "class Thing:", "", "cannot be read"),
        ({"editor/bad": "_target_: bad.Thing\n"}, "class Thing: ...", "selfimprove<0.0.1", "it needs selfimprove<0.0.1"),
        ({"editor/bad": "_target_: bad.Thing\n"}, "class Thing: ...", "no-such-distribution-at-all>=2", "which is not installed"),
    ],
)
def test_a_broken_plugin_is_listed_with_the_reason(typed: Shell, site: Path, options: dict[str, str], code: str, requires: str, reason: str) -> None:
    distribution(site, "bad", options, code, requires=requires)
    exit_code, out, _ = typed("list")
    assert exit_code == 0
    [line] = [x for x in out.splitlines() if "BROKEN" in x]
    assert reason in line
    assert typed("run", TOY, "--cfg", "job")[0] == 0, "a broken plugin does not stop the others"


def test_a_plugin_without_its_folder_is_broken(typed: Shell, site: Path) -> None:
    import shutil

    distribution(site, "bad", {"editor/bad": "_target_: bad.Thing\n"})
    shutil.rmtree(site / "bad")
    code, out, _ = typed("list")
    assert code == 0
    assert "BROKEN: bad 1.0: its entry point names bad.conf, which is not there" in out
    assert typed("run", TOY, "--cfg", "job")[0] == 0


def test_a_plugin_that_cannot_be_imported_says_so_when_it_is_used(typed: Shell, site: Path) -> None:
    distribution(site, "bad", {"editor/bad": "_target_: bad.Thing\nedits: 1\n"}, "import no_such_module_at_all\nclass Thing: ...")
    code, _, err = typed("run", TOY, "editor=bad")
    assert code == 2
    assert "the plugin bad 1.0 is broken" in err
    assert "no_such_module_at_all" in err


def test_a_plugin_that_breaks_its_contract_is_named_without_a_traceback(typed: Shell, site: Path) -> None:
    code = """\
        from selfimprove import hookimpl

        class Liar:
            @hookimpl
            def reward(self, trials):
                return []
        """
    distribution(site, "liar", {"rewarder/liar": "# Returns too little.\n_target_: liar.Liar\n"}, code)
    exit_code, _, err = typed("run", TOY, "rewarder=liar")
    assert exit_code == 1
    assert "reward returned 0 evaluations for 4 trials" in err


def test_a_constructor_that_refuses_its_arguments_is_a_clear_error(typed: Shell, site: Path) -> None:
    distribution(
        site,
        "fussy",
        {"editor/fussy": "_target_: fussy.Fussy\nn: 1\n"},
        "class Fussy:\n    def __init__(self, n: int):\n        raise ValueError('n is odd')",
    )
    code, _, err = typed("run", TOY, "editor=fussy")
    assert code == 2
    assert "fussy.Fussy cannot be made (n is odd)" in err
