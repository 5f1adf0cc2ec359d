"""Tasks: the laws of the generated biographies over hundreds of people, and SQuAD-shaped files however broken."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from selfimprove import identity
from selfimprove.errors import ConfigError
from selfimprove.task import SPLITS, Split, Task
from selfimprove.tasks import biographies
from selfimprove.tasks.biographies import Biographies, Biography
from selfimprove.tasks.facts import FACTS
from selfimprove.tasks.squad import Squad
from selfimprove.testing import TaskContract

REAL = Path(__file__).parents[1] / ".." / "shared" / "data" / "squad" / "train_199.json"
laws = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class TestBiographiesContract(TaskContract):
    def make_plugin(self) -> Task:
        return Biographies()


# ---- biographies ---------------------------------------------------------------------------------------


def check(person: Biography, questions: int) -> None:
    """The laws of one biography."""
    text, name = person.text.lower(), person.name.lower()
    answers = [e.answer.lower() for e in person.entries]
    assert len(answers) == len(set(answers)) == questions
    assert 50 <= len(text.split()) <= 70, person
    assert len(re.findall(r"[.](?: |$)", person.text)) == questions, "one sentence for each fact"
    assert person.text.split(". ")[0].count(person.name) == 1, "the first sentence names its subject in full"
    assert len({e.fact for e in person.entries}) == questions
    for entry in person.entries:
        answer = entry.answer.lower()
        assert entry.answer in person.text
        assert text.count(answer) == 1, person
        assert 1 <= len(answer.split()) <= 4
        assert answer not in name
        assert not any(answer in e.question.lower() for e in person.entries), person
        assert sum(answer in other for other in answers) == 1, person
        assert person.name in entry.question
        assert entry.question.endswith("?")
        assert "{" not in entry.question + person.text


@laws
@given(
    seed=st.integers(0, 2**40),
    split=st.sampled_from(SPLITS),
    index=st.integers(0, 6_000),
    questions=st.integers(5, 7),
)
def test_every_person_is_lawful(seed: int, split: Split, index: int, questions: int) -> None:
    task = Biographies(questions=questions, seed=seed)
    person = task.person(split, index)
    check(person, questions)
    assert person == Biographies(train=1, test=2, questions=questions, seed=seed).person(split, index)


@pytest.mark.parametrize("questions", [5, 6, 7])
def test_hundreds_of_people_are_lawful(questions: int) -> None:
    task = Biographies(train=200, validation=100, test=100, questions=questions)
    for split in SPLITS:
        for person in task.people(split):
            check(person, questions)
    lengths = [len(p.text.split()) for p in task.people("train")]
    assert 50 < sum(lengths) / len(lengths) < 66


def test_nobody_shares_a_name() -> None:
    task = Biographies(train=300, validation=300, test=300)
    names = [p.name.split() for split in SPLITS for p in task.people(split)]
    assert len({first for first, _ in names}) == len({last for _, last in names}) == len(names)
    others = Biographies(train=300, seed=1).people("train")
    assert not {p.name for p in others} & {" ".join(n) for n in names}


def test_no_person_of_one_split_is_named_in_another() -> None:
    """Also not as somebody's teacher or pet: what is learned about one split says nothing about another."""
    task = Biographies(train=150, validation=150, test=150)
    given: dict[str, Split] = {}
    for split in SPLITS:
        for person in task.people(split):
            for name in [person.name, *(e.answer for e in person.entries if e.fact in {"spouse", "teacher", "friend", "child", "pet"})]:
                assert given.setdefault(name.split()[0], split) == split


def test_asking_for_more_people_changes_nobody() -> None:
    few, many = Biographies(train=5, validation=3, test=4), Biographies(train=50, validation=30, test=40)
    for split in SPLITS:
        assert many.items(split)[: len(few.items(split))] == few.items(split)
        assert few.answers(split).items() <= many.answers(split).items()


def test_ids_and_titles() -> None:
    item = Biographies().items("validation")[3]
    assert item.id == "validation-0003"
    assert [q.id for q in item.questions] == [f"validation-0003/{j}" for j in range(6)]
    assert item.context.startswith(item.title) or item.title in item.context


def test_answers_cannot_be_guessed() -> None:
    """The most common answer to a kind of question is rare, and so is each of its words where it is not the kind of thing asked for."""
    found: dict[str, Counter[str]] = {}
    for person in Biographies(train=1500, questions=7).people("train"):
        for entry in person.entries:
            found.setdefault(entry.fact, Counter())[entry.answer] += 1
    assert set(found) == set(FACTS)
    for fact, answers in found.items():
        assert answers.total() > 300, fact
        assert answers.most_common(1)[0][1] < 0.05 * answers.total(), (fact, answers.most_common(3))
    assert sum(len(a) for a in found.values()) > 0.6 * sum(a.total() for a in found.values())


def test_biographies_differ_in_what_they_tell_and_how() -> None:
    people = Biographies(train=200).people("train")
    assert len({frozenset(e.fact for e in p.entries) for p in people}) > 190
    assert len({e.question.replace(p.name, "") for p in people for e in p.entries}) >= 4 * len(FACTS)


def words(form: str) -> list[str]:
    return re.findall(r"\w+", form.lower())


def test_questions_do_not_copy_sentences() -> None:
    """No four words in a row of a question stand in a sentence about the same fact."""
    assert len(FACTS) >= 12
    for name, fact in FACTS.items():
        assert len(set(fact.sentences)) >= 6, name
        assert len(set(fact.questions)) >= 4, name
        told = [f" {' '.join(words(s))} " for s in fact.sentences]
        for question in fact.questions:
            assert "{name}" in question
            asked = words(question)
            for i in range(len(asked) - 3):
                run = f" {' '.join(asked[i : i + 4])} "
                assert not any(run in sentence for sentence in told), (name, question)


def test_sentence_forms_are_whole() -> None:
    for name, fact in FACTS.items():
        for form in fact.sentences:
            marks = re.findall(r"\{(\w+)\}", form)
            assert set(marks) <= {"s", "o", "p", "a", "an", "x"}, (name, form)
            assert sum(m in {"a", "an"} for m in marks) == 1, (name, form)
            assert set(marks) & {"s", "o", "p"}, ("nobody is the subject of", name, form)
            assert form.endswith("."), (name, form)


def test_making_people_is_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run never makes the sealed people: neither the fingerprint nor another split needs them."""
    made: list[str] = []
    person = Biographies.person

    def spy(self: Biographies, split: Split, index: int) -> Biography:
        made.append(split)
        return person(self, split, index)

    monkeypatch.setattr(Biographies, "person", spy)
    task = Biographies(train=2)
    assert [task.fingerprint(s) for s in SPLITS]
    assert made == []
    task.items("train")
    task.answers("train")
    assert made == ["train", "train"]


def test_fingerprints_follow_the_parameters() -> None:
    tasks = [Biographies(), Biographies(seed=1), Biographies(questions=5), Biographies(test=61)]
    assert len({t.fingerprint("test") for t in tasks}) == 4
    assert len({t.fingerprint(s) for t in tasks[:1] for s in SPLITS}) == 3


def test_the_people_belong_to_the_version() -> None:
    """Fails when the people of a seed change; then raise `biographies.VERSION`, and record both here."""
    task = Biographies(train=40, validation=40, test=40)
    people = [[i.title, i.context, [q.text for q in i.questions]] for s in SPLITS for i in task.items(s)]
    assert (biographies.VERSION, identity.digest(people, [dict(task.answers(s)) for s in SPLITS])) == (2, "991e04642ed61a48791f5adc11ba144f")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": -1}, r"task\.train=-1 is not possible; give a whole number of people from 0 to 6120"),
        ({"test": 10**9}, r"task\.test=1000000000 is not possible"),
        ({"validation": 2.5}, r"task\.validation=2\.5"),
        ({"train": "many"}, r"task\.train='many'"),
        ({"train": True}, r"task\.train=True"),
        ({"questions": 4}, r"task\.questions=4 is not possible; a biography has 5, 6 or 7"),
        ({"questions": 8}, r"task\.questions=8"),
    ],
)
def test_impossible_biographies(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Biographies(**options)


def test_an_empty_split() -> None:
    assert Biographies(validation=0).items("validation") == ()
    assert Biographies(validation=0).answers("validation") == {}


# ---- squad -----------------------------------------------------------------------------------------------


def simple(n: int) -> list[dict[str, Any]]:
    return [
        {
            "title": f"Title {i // 3}",
            "context": f"Context {i} tells of the answer {i}.",
            "questions": [{"question": f"What is {j} of {i}?", "answer": f"answer {i}"} for j in range(2)],
        }
        for i in range(n)
    ]


def official(n: int) -> dict[str, Any]:
    """The same contexts and questions in the form of SQuAD v1.1."""
    articles: dict[str, list[dict[str, Any]]] = {}
    for i, entry in enumerate(simple(n)):
        qas = [
            {"id": f"{i}-{j}", "question": q["question"], "answers": [{"text": q["answer"], "answer_start": 4}]}
            for j, q in enumerate(entry["questions"])
        ]
        articles.setdefault(entry["title"], []).append({"context": entry["context"], "qas": qas})
    return {"version": "1.1", "data": [{"title": t, "paragraphs": p} for t, p in articles.items()]}


def rows(n: int) -> list[dict[str, Any]]:
    """The same as rows of the hub."""
    return [
        {
            "id": f"{i}-{j}",
            "title": e["title"],
            "context": e["context"],
            "question": q["question"],
            "answers": {"text": [q["answer"]], "answer_start": [4]},
        }
        for i, e in enumerate(simple(n))
        for j, q in enumerate(e["questions"])
    ]


Write = Callable[[Any], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: Any) -> str:
        path = tmp_path / "squad.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    return put


class TestSquadContract(TaskContract):
    @pytest.fixture(autouse=True)
    def file(self, write: Write) -> None:
        self.path = write(simple(20))

    def make_plugin(self) -> Task:
        return Squad(self.path)


def everything(task: Task) -> list[Any]:
    return [(list(task.items(s)), dict(task.answers(s))) for s in SPLITS]


def test_all_forms_read_the_same(write: Write) -> None:
    found = [everything(Squad(write(form(20)))) for form in (simple, official, rows)]
    assert found[0] == found[1] == found[2]
    [(train, answers), (validation, _), (test, _)] = found[0]
    assert [len(train), len(validation), len(test)] == [12, 2, 6]
    [number] = re.findall(r"Context (\d+)", train[0].context)
    assert train[0].title == f"Title {int(number) // 3}"
    assert answers[train[0].questions[1].id] == (f"answer {number}",)
    assert train[0].questions[1].id == "train-0000/1"


def test_a_byte_order_mark_is_no_obstacle(write: Write) -> None:
    assert len(Squad(write(b"\xef\xbb\xbf" + json.dumps(simple(20)).encode())).items("train")) == 12


@laws
@given(
    contexts=st.lists(st.integers(0, 12), min_size=4, max_size=40).filter(lambda x: len(set(x)) >= 4),
    seed=st.integers(0, 99),
    train=st.integers(1, 2),
)
def test_no_context_is_in_two_splits(write: Write, contexts: list[int], seed: int, train: int) -> None:
    entries = [
        {"title": "", "context": f" context {c}\n", "questions": [{"question": f"Which {c % 2}?", "answer": f"{i}"}]} for i, c in enumerate(contexts)
    ]
    task = Squad(write(entries), train=train, validation=1, test=1, seed=seed)
    seen = [item.context for split in SPLITS for item in task.items(split)]
    assert len(seen) == len(set(seen)) == train + 2
    for split in SPLITS:
        for item in task.items(split):
            number = int(item.context.split()[-1])
            expected = dict.fromkeys(str(i) for i, c in enumerate(contexts) if c == number)
            assert task.answers(split)[item.questions[0].id] == tuple(expected), "a repeated question has all its answers"


def test_splits_are_seeded_and_the_sealed_one_stays(write: Write) -> None:
    path = write(simple(40))
    base = Squad(path, train=10, validation=5, test=10)
    assert everything(base) == everything(Squad(path, train=10, validation=5, test=10))
    assert base.items("test") != Squad(path, train=10, validation=5, test=10, seed=1).items("test")
    assert base.items("test") == Squad(path, train=3, validation=1, test=10).items("test")
    shuffled = write(simple(40)[::-1])
    assert [i.context for i in Squad(shuffled, train=10, validation=5, test=10).items("test")] == [i.context for i in base.items("test")]


def test_squad_fingerprints(write: Write) -> None:
    def prints(**options: Any) -> list[str]:
        return [Squad(path, **options).fingerprint(s) for s in SPLITS]

    path = write(simple(20))
    one = prints()
    assert len(set(one)) == 3
    assert not set(one) & set(prints(seed=1))
    assert not set(one) & set(prints(test=5))
    path = write(simple(21))
    assert not set(one) & set(prints())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON file in UTF-8"),
        (b"\xff\xfe\x00", "not a JSON file in UTF-8"),
        (b"question,answer\n", "not a JSON file in UTF-8"),
        (b"[" * 200_000, "nested too deeply|not a JSON file"),
        (b"[" + b"9" * 5000 + b"]", "not a JSON file in UTF-8"),
        (7, r"wanted a list of contexts or SQuAD's \{data: \[…\]\}, got 7 \(int\)"),
        (None, "got nothing"),
        ([], "no question with an answer"),
        ({}, "squad.json: data: wanted a list, got nothing"),
        ({"data": []}, "data: wanted at least one entry"),
        ({"data": [3]}, r"data\[0\]: wanted an object with named fields, got 3 \(int\)"),
        ({"data": [{"title": "t"}]}, r"data\[0\]\.paragraphs: wanted a list, got nothing"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"data\[0\]\.paragraphs\[0\]\.context: wanted a text, got nothing"),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]},
            r"paragraphs\[0\]\.qas\[0\]\.answer: wanted a text, got nothing",
        ),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}]},
            r"qas\[0\]\.answers: wanted at least one answer.*is_impossible",
        ),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "x"}, {"txt": "y"}]}]}]}]},
            r"qas\[0\]\.answers\[1\]: wanted a text, got nothing",
        ),
        (
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "i", "question": q, "answers": [{"text": "x"}]} for q in "qr"]}]}]},
            r"qas\[1\]\.id: 'i' \(str\) is already the id of data\[0\]\.paragraphs\[0\]\.qas\[0\]",
        ),
        (["text"], r"\[0\]: wanted an object"),
        ([{"context": 5}], r"\[0\]\.context: wanted a text, got 5 \(int\)"),
        ([{"title": [], "context": "c"}], r"\[0\]\.title: wanted a text, got \[\] \(list\)"),
        ([{"context": "c", "questions": "q"}], r"\[0\]\.questions: wanted a list, got 'q' \(str\)"),
        ([{"context": "c", "questions": []}], r"\[0\]\.questions: wanted at least one entry"),
        ([{"context": "c", "questions": [{"question": " ", "answer": "a"}]}], r"\[0\]\.questions\[0\]\.question: wanted a text, got an empty one"),
        ([{"context": "c", "questions": [{"question": "q", "answer": ""}]}], r"questions\[0\]\.answer: wanted a text, got an empty one"),
        ([{"context": "c", "questions": [{"question": "q", "answer": 1907}]}], r"questions\[0\]\.answer: wanted a text, got 1907 \(int\)"),
        ([{"context": "c" * 100_001, "questions": []}], r"\[0\]\.context: wanted at most 100000 characters, got 100001"),
        ([{"context": "\ud800", "questions": []}], r"\[0\]\.context: not a valid text"),
        ([{"context": "c", "question": "q", "answers": {"text": []}}], r"\[0\]\.answers: wanted at least one answer"),
        ([{"context": "c", "question": "q", "answers": {"start": [1]}}], r"\[0\]\.answers: wanted a text, got nothing"),
        ([{"context": "c", "question": "q", "answers": [], "is_impossible": True}], "no question with an answer"),
    ],
)
def test_broken_files_say_where_and_what(write: Write, content: Any, message: str) -> None:
    task = Squad(write(content))
    with pytest.raises(ConfigError, match=message) as raised:
        task.items("train")
    assert "squad.json: " in str(raised.value)
    assert len(str(raised.value)) < 600


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_subnormal=False) | st.text(max_size=5)
keys = st.sampled_from(["data", "title", "paragraphs", "context", "qas", "questions", "question", "answer", "answers", "text", "id", "is_impossible"])
shapes = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=5), max_leaves=25)


@laws
@given(shapes)
@example({"data": {"data": []}})
@example([{"context": "c", "question": "q", "answers": {"text": {"text": "x"}}}])
def test_any_json_is_read_or_refused(write: Write, content: Any) -> None:
    with contextlib.suppress(ConfigError):
        everything(Squad(write(content)))


@laws
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(write: Write, content: bytes) -> None:
    with contextlib.suppress(ConfigError):
        everything(Squad(write(content)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 30}, r"has 20 distinct contexts, but 30 for train \+ 2 for validation \+ 6 for test are 38; lower task\.train"),
        ({"train": 0.9}, r"18 for train \+ 2 for validation \+ 6 for test are 26"),
        ({"validation": 0.01}, r"too few for task\.validation=0\.01"),
        ({"train": -1}, r"task\.train=-1 is no size"),
        ({"train": 1.5}, r"task\.train=1\.5 is no fraction"),
        ({"train": True}, r"task\.train=True is no size"),
        ({"train": "half"}, r"task\.train='half' is no size"),
        ({"train": float("nan")}, r"is no size"),
        ({"dataset": "squad"}, "reads one source"),
    ],
)
def test_impossible_splits(write: Write, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Squad(write(simple(20)), **options).items("train")


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reads one source.*task\.path=FILE\.json"):
        Squad()
    with pytest.raises(ConfigError, match=r"task\.path=.*nowhere\.json does not exist; give a SQuAD-shaped JSON file"):
        Squad(str(tmp_path / "nowhere.json"))
    with pytest.raises(ConfigError, match="is a folder; give"):
        Squad(str(tmp_path))


def test_the_hub_form_through_datasets(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    task = Squad(dataset=str(tmp_path / "data"))
    assert everything(task) == everything(Squad(write(rows(20))))
    assert task.fingerprint("test") == Squad(dataset=str(tmp_path / "data")).fingerprint("test")
    with pytest.raises(ConfigError, match=r"task\.dataset=.*task\.rows=gone.*cannot be loaded"):
        Squad(dataset=str(tmp_path / "data"), rows="gone").items("train")


def test_a_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"task\.dataset=nobody/nothing .*cannot be loaded: .*go online, or download") as raised:
        Squad(dataset="nobody/nothing").items("train")
    assert "\n" not in str(raised.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'selfimprove\[datasets\]'"):
        Squad(dataset="squad").items("train")


@pytest.mark.skipif(not REAL.exists(), reason="the shared SQuAD sample is not beside this checkout")
def test_the_real_file() -> None:
    task = Squad(str(REAL))
    sizes = [len(task.items(s)) for s in SPLITS]
    assert sizes == [119, 19, 59]
    contexts = [i.context for s in SPLITS for i in task.items(s)]
    assert len(set(contexts)) == len(contexts)
    for split in SPLITS:
        for item in task.items(split):
            assert item.title
            assert item.questions
            assert all(task.answers(split)[q.id][0] for q in item.questions)
