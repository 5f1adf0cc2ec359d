"""Problems from files: GSM8K's and MATH's forms, and files however broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.graders import Answer
from selfimprove.ledger import Ledger
from selfimprove.mathematics import MathGrader
from selfimprove.task import SPLITS, Task
from selfimprove.tasks.problems import Problems
from selfimprove.testing import TaskContract

REAL = Path(__file__).parents[1] / ".." / "shared" / "data" / "gsm8k" / "train_500.jsonl"
GSM8K = [{"question": f"How many is {i} and {i}?", "answer": f"It is {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}"} for i in range(40)]
MATH = [
    {"problem": f"Find ${i}/2$.", "solution": rf"So $x=\boxed{{1}}$, no: \boxed{{\frac{{{i}}}{{2}}}}.", "level": f"Level {1 + i % 5}"}
    for i in range(40)
]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("problems")
    written(made / "gsm8k.jsonl", GSM8K)
    written(made / "math.jsonl", MATH)
    (made / "list.json").write_text(json.dumps(MATH), encoding="utf-8")
    return made


class TestProblemsContract(TaskContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder: Path) -> None:
        self.folder = folder

    def make_plugin(self) -> Task:
        return Problems(path=self.folder / "gsm8k.jsonl")


def test_gsm8ks_final_answer_stands_after_the_hashes(folder: Path) -> None:
    task = Problems(path=folder / "gsm8k.jsonl")
    for item in task.items("train"):
        [question] = item.questions
        assert item.context == ""
        number = int(question.text.split()[3])
        assert task.answers("train")[question.id] == (f"{2 * number:,}",)


def test_maths_final_answer_stands_in_the_last_box(folder: Path) -> None:
    task = Problems(path=folder / "math.jsonl", train=20, validation=10, test=10)
    item = task.items("test")[0]
    number = int(item.questions[0].text.removeprefix("Find $").split("/")[0])
    assert task.answers("test")[item.questions[0].id] == (rf"\frac{{{number}}}{{2}}",)
    assert item.level == number % 5
    as_list = Problems(path=folder / "list.json", train=20, validation=10, test=10)
    assert as_list.items("train") == task.items("train")


def test_an_answer_of_its_own_goes_before_the_solution(tmp_path: Path) -> None:
    path = written(tmp_path / "x", [{"problem": "p", "solution": "no box", "answer": "7", "level": 3}])
    task = Problems(path=path, train=1, validation=0, test=0)
    assert task.answers("train") == {"train-0000/0": ("7",)}
    assert task.items("train")[0].level == 2


def test_the_sealed_problems_stay_the_same(folder: Path) -> None:
    few, many = Problems(path=folder / "gsm8k.jsonl", train=3), Problems(path=folder / "gsm8k.jsonl", train=20)
    assert few.items("test") == many.items("test")
    assert few.items("validation") == many.items("validation")


def test_a_repeated_question_is_one_problem(tmp_path: Path) -> None:
    path = written(tmp_path / "x", GSM8K[:10] * 3)
    task = Problems(path=path, train=6, validation=2, test=2)
    assert len({i.questions[0].text for s in SPLITS for i in task.items(s)}) == 10
    with pytest.raises(ConfigError, match="10 distinct problems, but 8"):
        Problems(path=path, train=8, validation=2, test=2).items("train")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q"}], r"\[0\]\.answer: wanted a text, got nothing"),
        ([{"question": "q", "answer": "x ####  "}], "after ####"),
        ([{"problem": "p", "solution": "no box"}], r"\[0\]\.solution: wanted a final answer in \\boxed"),
        ([{"problem": "", "answer": "1"}], r"\[0\]\.problem: wanted a text, got an empty one"),
        ([[1]], "wanted an object with named fields"),
        ([], "holds no problem"),
    ],
)
def test_rows_that_are_no_problems(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Problems(path=written(tmp_path / "x.jsonl", rows)).items("train")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give task\.path=FILE"):
        Problems()
    with pytest.raises(ConfigError, match="is a folder"):
        Problems(path=tmp_path)
    (tmp_path / "x").write_text('{"question": "q", "answer": "1"}\n{oops\n')
    with pytest.raises(ConfigError, match="x, line 2: not JSON"):
        Problems(path=tmp_path / "x").items("train")
    with pytest.raises(ConfigError, match=r"task\.dataset=no/such/thing .*cannot be loaded"):
        Problems(dataset="no/such/thing").items("train")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any").write_bytes(data)
    with pytest.raises(ConfigError):
        Problems(path=tmp_path / "any").items("train")


@pytest.mark.skipif(not REAL.exists(), reason="shared data is not here")
def test_real_problems_and_their_worked_solutions() -> None:
    """Every worked solution is right by the grader, and the next problem's mostly is not."""
    task = Problems(path=REAL, train=200, validation=0.1, test=0.3)
    problems = task.problems("train")
    rows = {r["question"].strip(): r["answer"] for r in map(json.loads, REAL.read_text(encoding="utf-8").splitlines())}
    said = [rows[p.question] for p in problems]
    grader = MathGrader()
    assert grader.grade([Answer(p.question, (p.answer,), t) for p, t in zip(problems, said, strict=True)], Ledger()) == [1.0] * 200
    others = grader.grade([Answer(p.question, (p.answer,), t) for p, t in zip(problems, said[1:] + said[:1], strict=True)], Ledger())
    assert sum(others) < 20
