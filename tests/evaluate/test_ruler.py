"""RULER's samples have the asked length, hold their answers and depend on the seed; scoring matches hand-made cases."""

from __future__ import annotations

import collections
import json
import math
import random
import re
from pathlib import Path

import pytest
from tiny import CONFIG
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_linearard.errors import UserError
from mlx_linearard.evaluate.model import Directory, open_directory
from mlx_linearard.evaluate.suites.haystack import Prose, fill, join
from mlx_linearard.evaluate.suites.ruler import TASKS, QuestionSet, Ruler, score

LENGTHS = (4096, 3000)
SENTENCE = "{} {} walked to the {} {} and {} of {}, for {} and {} were {}."


def novel(words: int) -> str:
    """Made-up prose with many distinct words."""
    rng = random.Random(3)
    syllables = ["ba", "ker", "lo", "min", "ta", "ser", "u", "vel", "or", "pin", "dra", "sh", "e", "ing"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(900)]
    return " ".join(SENTENCE.format(*rng.choices(vocabulary, k=9)) for _ in range(words // 14))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """A config and a BPE tokenizer trained on the prose; there are no weights."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [novel(4000), "One of the special magic numbers uuids. The grass is green. The sky is blue. 1 2 3 VAR"]
    tokenizer.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 1500, "max_position_embeddings": 8192}))
    return open_directory(folder)


@pytest.fixture(scope="module")
def ruler(tmp_path_factory: pytest.TempPathFactory) -> Ruler:
    folder = tmp_path_factory.mktemp("qa")
    text = novel(30000)
    documents = [{"doc": i, "text": text[i * 500 : i * 500 + 480], "title": f"t{i % 7}"} for i in range(300)]
    documents[5]["text"] += " The answer is Xylophone."
    documents[9]["text"] += " It was Vermilion, in the end."
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    questions = [
        {"query": "What is the answer?", "outputs": ["Xylophone"], "doc": 5},
        {"query": "Which one was it?", "outputs": ["Vermilion", "red"], "docs": [9, 10]},
    ]
    (folder / "qas.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    qa = QuestionSet.read(str(folder / "qas.jsonl"), str(folder / "docs.jsonl"))
    return Ruler(Prose(novel(20000)), LENGTHS, tuple(TASKS), {"qa_1": qa, "qa_2": qa}, samples=2)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_each_task_meets_its_length_and_holds_its_answers(
    ruler: Ruler, directory: Directory, task: str, length: int
) -> None:
    samples = [ruler.sample(directory, task, length, i) for i in range(2)]
    for sample in samples:
        used = len(directory.encode(sample.prompt)) + TASKS[task][1]
        assert 0.98 * length <= used <= length
        found = [output in sample.text for output in sample.outputs]
        assert any(found) if task.startswith("qa") else all(found)
    assert ruler.sample(directory, task, length, 0) == samples[0] != samples[1]
    other = Ruler(ruler.prose, LENGTHS, ruler.tasks, ruler.qa, seed=7).sample(directory, task, length, 0)
    assert other.prompt != samples[0].prompt


def answers(task: str) -> int:
    return {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(task, 1)


@pytest.mark.parametrize("task", [t for t in TASKS if not t.startswith("qa")])
def test_each_task_asks_for_as_many_answers_as_the_paper(ruler: Ruler, directory: Directory, task: str) -> None:
    assert len(set(ruler.sample(directory, task, 3000, 0).outputs)) == answers(task)


def test_needles_are_of_the_kinds_in_the_table(ruler: Ruler, directory: Directory) -> None:
    needle = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
    kinds = {"numbers": r"\d{7}", "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"}
    hidden = {
        "niah_single_1": (1, 1),
        "niah_single_2": (1, 1),
        "niah_single_3": (1, 1),
        "niah_multikey_1": (4, 4),
        "niah_multivalue": (4, 1),
        "niah_multiquery": (4, 4),
    }
    for task in [t for t in TASKS if t.startswith("niah")]:
        sample = ruler.sample(directory, task, 4096, 1)
        found = needle.findall(sample.text)
        kind = "uuids" if task in ("niah_single_3", "niah_multikey_3") else "numbers"
        assert all(k == kind and re.fullmatch(kinds[kind], value) for k, _, value in found)
        if task in hidden:
            assert (len(found), len({key for _, key, _ in found})) == hidden[task]
        else:
            assert len(found) > 30  # every line is one
        asked = [key for _, key, value in found if value in sample.outputs]
        assert all(key in sample.answer_prefix for key in asked) and len(asked) == len(sample.outputs)


def test_variables_are_assigned_in_order_after_an_example(ruler: Ruler, directory: Directory) -> None:
    sample = ruler.sample(directory, "vt", 3000, 0)
    chains = re.findall(r"VAR ([A-Z]{5}) = (VAR [A-Z]{5}|\d{5})\n", sample.text)
    assert len(chains) == 10 and tuple(name for name, _ in chains[5:]) == sample.outputs
    assert [value for _, value in chains[6:]] == [f"VAR {name}" for name in sample.outputs[:-1]]
    assert not {name for name, _ in chains[:5]} & set(sample.outputs)
    example = sample.text.split("\n\n")[0]
    assert len(directory.encode(example)) <= 500 and chains[5][1] in sample.answer_prefix


@pytest.mark.parametrize(("length", "counts"), [(4096, (30, 3)), (3000, (6, 1))])
def test_common_words_appear_as_often_as_they_should(
    ruler: Ruler, directory: Directory, length: int, counts: tuple[int, int]
) -> None:
    sample = ruler.sample(directory, "cwe", length, 0)
    found = collections.Counter(re.findall(r"\d+\. (\S+)", sample.text.rpartition("Below is")[2]))
    assert {found[word] for word in sample.outputs} == {counts[0]}
    assert {n for word, n in found.items() if word not in sample.outputs} == {counts[1]}


def test_frequent_words_are_ranks_two_to_four(ruler: Ruler, directory: Directory) -> None:
    sample = ruler.sample(directory, "fwe", 4096, 0)
    found = collections.Counter(sample.text.split("\n")[1].split())
    assert found.most_common(1)[0][0] == "..."
    counts = [found[word] for word in sample.outputs]
    assert counts == sorted(counts, reverse=True) and counts == [n for _, n in found.most_common(4)][1:]
    assert found["..."] / counts[0] == pytest.approx(4, rel=0.05)  # k ** -2


def test_documents_of_the_same_title_come_first(ruler: Ruler) -> None:
    qa = ruler.qa["qa_1"]
    order, own = qa.ordered(qa.questions[0], random.Random(0))
    assert own == 1 and order[0] == 5 and len(set(order)) == 300
    titles = [qa.documents[doc]["title"] == "t5" for doc in order]
    assert titles == sorted(titles, reverse=True)


def test_scoring_matches_cases_made_by_hand() -> None:
    assert score("niah_multivalue", " 1234567, and 7654321.", ["1234567", "7654321", "1111111", "2222222"]) == 0.5
    assert score("vt", "abcde FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST", "UVWXY"]) == pytest.approx(0.4)
    assert score("qa_1", "It is the COLTS\x00of course", ["broncos", "Colts"]) == 1
    assert score("qa_2", "nobody knows", ["broncos", "Colts"]) == 0
    assert score("cwe", "", ["a", "b"]) == 0
    assert score("fwe", "one\ttwo", ["one\ntwo"]) == 1  # control characters become line ends


def test_impossible_samples_are_refused(ruler: Ruler, directory: Directory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs questions: give --data qa_1="):
        Ruler(ruler.prose, (3000,), ("qa_1",)).items(directory, 8192)
    with pytest.raises(UserError, match="--lengths 9000 does not fit"):
        Ruler(ruler.prose, (9000,), ("vt",)).items(directory, 8192)
    with pytest.raises(UserError, match="cwe at 500: its question alone takes"):
        Ruler(ruler.prose, (500,), ("cwe",)).items(directory, 8192)
    long_words = Prose(" ".join("".join(random.Random(i).choices("qxzjkvw", k=32)) for i in range(50)))
    with pytest.raises(
        UserError, match=r"niah_single_2 at \d+: its lines are too long to fill that length; give longer"
    ):
        for length in range(300, 500, 7):
            Ruler(long_words, (length,), ("niah_single_2",)).sample(directory, "niah_single_2", length, 0)
    few = QuestionSet({0: {"text": "one two"}}, [{"query": "q", "outputs": ["one"], "docs": [0]}])
    with pytest.raises(UserError, match="qa_1 at 3000: all its text has"):
        Ruler(ruler.prose, (3000,), ("qa_1",), {"qa_1": few}).items(directory, 8192)
    bad = tmp_path / "q.jsonl"
    bad.write_text('{"query": "q", "outputs": ["a"], "doc": 3}\n')
    docs = tmp_path / "d.jsonl"
    docs.write_text('{"doc": 0, "text": "t"}\n')
    with pytest.raises(UserError, match="line 1 names document 3"):
        QuestionSet.read(str(bad), str(docs))


# ---------------------------------------------------------------------------------------------------
# Samples have one reading


@pytest.mark.parametrize("index", range(6))
def test_no_sample_can_be_read_in_two_ways(ruler: Ruler, directory: Directory, index: int) -> None:
    """Each value has one key, each key has its number of values, and no answer is a part of another word."""
    needle = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")
    for task in [t for t in TASKS if t.startswith("niah")]:
        sample = ruler.sample(directory, task, 3000, index)
        pairs = needle.findall(sample.text)
        asked = {key for key, value in pairs if value in sample.outputs}
        assert sorted(value for key, value in pairs if key in asked) == sorted(sample.outputs)
        assert all(sample.text.count(output) == 1 for output in sample.outputs)
    sample = ruler.sample(directory, "vt", 3000, index)
    value = sample.answer_prefix.split("value ")[1].split()[0]
    example, asked_text = sample.text.split("\n\n", 1)
    assert value not in example and not any(name in example for name in sample.outputs)
    assert asked_text.count(f"= {value}") == 1
    sample = ruler.sample(directory, "cwe", 4096, index)
    listed = collections.Counter(re.findall(r"\d+\. (\S+)", sample.text.split("\n\n")[1]))
    assert not [(a, b) for a in sample.outputs for b in listed if a in b and a != b]
    assert {word for word, _ in listed.most_common(10)} == set(sample.outputs)


@pytest.mark.parametrize("length", [384, 512, 777, 3000])
def test_the_answers_are_the_most_frequent_words_at_any_length(ruler: Ruler, directory: Directory, length: int) -> None:
    for index in range(8):
        sample = ruler.sample(directory, "fwe", length, index)
        text = sample.text.split("\n")[1]
        counts = collections.Counter(text.split()).most_common()
        assert counts[0][0] == "..." and {word for word, _ in counts[1:4]} == set(sample.outputs)
        assert counts[3][1] > (counts[4][1] if len(counts) > 4 else 0)
        used = len(directory.encode(sample.prompt)) + TASKS["fwe"][1]
        assert 0.98 * length <= used <= length


@pytest.mark.parametrize("length", range(1024, 1100, 15))
def test_lines_of_uuids_fill_any_length(ruler: Ruler, directory: Directory, length: int) -> None:
    for index in range(3):
        sample = ruler.sample(directory, "niah_multikey_3", length, index)
        assert 0.98 * length <= len(directory.encode(sample.prompt)) + 128 <= length


def test_a_question_that_cannot_be_asked_is_skipped(ruler: Ruler, directory: Directory) -> None:
    documents = {
        0: {"text": "Yes is not here: the answer is Oak."},
        1: {"text": "Elm it was. " + novel(4000)},
        2: {"text": "It was Ash."},
        3: {"text": novel(3000)},
    }
    questions = [
        {"query": "Is it?", "outputs": ["no"], "docs": [2]},
        {"query": "Which?", "outputs": ["Elm"], "docs": [1]},  # its own document does not fit
        {"query": "Which?", "outputs": ["Ash"], "docs": [2]},
        {"query": "Which?", "outputs": ["Oak"], "docs": [0]},
    ]
    made = Ruler(ruler.prose, (3000,), ("qa_1",), {"qa_1": QuestionSet(documents, questions)})
    found = [made.sample(directory, "qa_1", 3000, i).outputs for i in range(4)]
    assert found == [("Ash",), ("Oak",), ("Ash",), ("Oak",)]
    none = Ruler(ruler.prose, (3000,), ("qa_1",), {"qa_1": QuestionSet(documents, questions[:2])})
    with pytest.raises(UserError, match="no question's own documents hold its answer and fit"):
        none.items(directory, 8192)


def test_a_text_without_spaces_or_full_stops_is_a_haystack_too(directory: Directory) -> None:
    chinese = "".join(random.Random(1).choices("天地玄黄宇宙洪荒日月盈昃", k=4000))
    for text in (chinese, "。".join(chinese[i : i + 9] for i in range(0, 4000, 9)), "so it goes on and on " * 9):
        suite = Ruler(Prose(text), (3000,), ("niah_single_2", "niah_multikey_1"))
        places = []
        for index in range(8):
            sample = suite.sample(directory, "niah_single_2", 3000, index)
            assert 0.98 * 3000 <= len(directory.encode(sample.prompt)) + 128 <= 3000
            context = sample.text.split("\n")[1]
            places.append(context.index("One of the special") / len(context))
        assert len({round(place, 1) for place in places}) > 2
    assert join(Prose(chinese).take(20)) == chinese[:320]


@pytest.mark.parametrize("tokens_per_word", [0.4, 1, 1.37, 3.9])
def test_a_size_is_found_with_few_counts(tokens_per_word: float) -> None:
    """The texts that are counted have in all at most as many tokens as three and a half full ones."""
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(100 + round(tokens_per_word * len(text) + 20 * math.sin(len(text))))  # the growth is not even
        return counted[-1]

    size = fill("w".__mul__, count, 30_000, "a text")
    assert 0.995 * 30_000 <= 100 + tokens_per_word * size + 20 * math.sin(size) <= 30_001
    assert sum(counted) <= 3.5 * 30_000
