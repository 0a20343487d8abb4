"""The catalogue's tasks from every layout that their data comes in."""

import json

import pytest
from helpers import Hub

from jaxfusion.data.rows.examples import read_examples
from jaxfusion.data.tasks.catalogue import QUESTIONS, TASKS
from jaxfusion.data.tasks.spec import last_unsigned
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import for_task
from jaxfusion.fields import EvalConfig


def read(name, language, path, split="test"):
    return read_examples(name, TASKS[name], split, language, str(path))


def write_xcopa(path, language, questions):
    (path / "data" / language).mkdir(parents=True)
    rows = [{"premise": f"{language} {i}", "choice1": "x", "choice2": "y", "question": question,
             "label": i % 2, "idx": i} for i, question in enumerate(questions)]
    (path / "data" / language / f"test.{language}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_xcopa_takes_its_questions_from_the_language_that_has_them_right(tmp_path):
    write_xcopa(tmp_path, "et", ["cause", "effect"])
    rows = write_xcopa(tmp_path, "sw", ["effect", "effect"])
    first, second = read("xcopa", "sw", tmp_path)
    assert first.query == ("Premise: sw 0\nWhich is more likely to be its cause?\nA: x\nB: y\n"
                           "Answer: ")
    assert (first.target, second.target) == ("A", "B") and "its effect?" in second.query
    # A user's own rows are as they are.
    (tmp_path / "test-sw.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert "its effect?" in read("xcopa", "sw", tmp_path)[0].query
    write_xcopa(tmp_path, "ta", ["cause"])
    with pytest.raises(InputError, match="1 rows, but 2 in 'et', from which column 'question'"):
        read("xcopa", "ta", tmp_path)


def test_a_winograd_pronoun_becomes_a_blank(tmp_path):
    def line(language, sentence, tokens, span, options):
        cells = (tokens, ["", span, []], options)
        return "\t".join([language, "test", "?", sentence, *map(json.dumps, cells)]) + "\n"

    tokens = ["``", "He", "saw", "him", "''", ",", "he", "said."]
    options = [["Ann", [], [], False], ["Bob", [], [], True]]
    (tmp_path / "dataset.tsv").write_text(
        line("jp", '"He saw him", he said.', tokens, [6, 7], options)
        + line("en", "Ann met Bob.", ["Ann", "met", "Bob."], [2, 3], options))
    found, = read("xwinograd", "ja", tmp_path)
    assert found.query.startswith('Sentence: "He saw him", _ said.\n') and found.target == "B"
    assert read("xwinograd", "en", tmp_path)[0].query.startswith("Sentence: Ann met _.\n")
    (tmp_path / "dataset.tsv").write_text(line("en", "Ann met her.", ["x"], [0, 1], options))
    with pytest.raises(InputError, match=r"dataset\.tsv:1: cannot be read .*pronoun"):
        read("xwinograd", "en", tmp_path)


def test_json_lists_and_places_by_task(tmp_path):
    (tmp_path / "mmmlu").mkdir()
    row = {"Question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "C"}
    (tmp_path / "mmmlu" / "sw.json").write_text(json.dumps([row], indent=1))
    found, = read("mmmlu", "sw", tmp_path / "{task}")
    assert found.query == "Question: q\nA: 1\nB: 2\nC: 3\nD: 4\nAnswer: " and found.label == 2
    (tmp_path / "mmmlu" / "sw.json").write_text("{}")
    with pytest.raises(InputError, match="expected a JSON list of objects"):
        read("mmmlu", "sw", tmp_path / "mmmlu")
    (tmp_path / "test-en.jsonl").write_text(json.dumps(
        {**{f"input_sentence_{i}": "s" for i in range(1, 5)}, "sentence_quiz1": "a",
         "sentence_quiz2": "b", "label": 3}) + "\n")
    with pytest.raises(InputError, match=r"label 3 is not one of A, B \(or 1, 2\)"):
        read("xstorycloze", "en", tmp_path)


@pytest.mark.parametrize("task, language, row, asked, target", [
    ("mmmlu", "sw", {"Question": "q", **dict.fromkeys("ABCD", "x"), "Answer": "D"},
     ("openai/MMMLU", "SW_KE", "test"), "D"),
    ("mmmlu", "en", {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 1},
     ("cais/mmlu", "all", "test"), "B"),
    ("xwinograd", "ja", {"sentence": "_", "option1": "a", "option2": "b", "answer": "2"},
     ("Muennighoff/xwinograd", "jp", "test"), "B"),
    ("xstorycloze", "te", {**{f"input_sentence_{i}": "s" for i in range(1, 5)},
                           "sentence_quiz1": "a", "sentence_quiz2": "b", "answer_right_ending": 1},
     ("juletxara/xstory_cloze", "te", "eval"), "A"),
    ("mgsm", "bn", {"question": "q", "answer": None, "answer_number": 18},
     ("juletxara/mgsm", "bn", "test"), "18"),
    ("m_mmlu", "ar", {"instruction": "q", **{f"option_{x}": "o" for x in "abcd"}, "answer": "C"},
     ("alexandrainst/m_mmlu", "ar", "test"), "C"),
    ("xcopa", "en", {"premise": "p", "choice1": "x", "choice2": "y", "question": "cause",
                     "label": 1}, ("pkavumba/balanced-copa", None, "test"), "B"),
])
def test_hub_rows_become_examples(task, language, row, asked, target, monkeypatch):
    hub = Hub(monkeypatch, [row])
    found, = read_examples(task, TASKS[task], "test", language, None)
    name, config, split = asked
    assert found.target == target and hub.asked == [(name, config, None), "downloaded", split]


def test_m_mmlu_is_its_first_thousand_rows(monkeypatch):
    """On which Lens was scored."""
    Hub(monkeypatch, [{"instruction": f"q{i}", **{f"option_{x}": "o" for x in "abcd"},
                       "answer": "C"} for i in range(1003)])
    found = read_examples("m_mmlu", TASKS["m_mmlu"], "test", "ar", None)
    assert len(found) == 1000 and found[-1].query == (
        "Question: q999\nA: o\nB: o\nC: o\nD: o\nAnswer: ")


def test_real_files_are_read_as_they_are(real_data):
    questions = (real_data / "derived" / "xcopa.test.question.txt").read_text().split()
    for language in ("et", "id", "sw", "ta", "zh"):
        rows = read("xcopa", language, real_data / "xcopa")
        assert all(f"its {q}?" in row.query for q, row in zip(questions, rows, strict=True))
    numbers = {"en": 2325, "fr": 83, "ja": 959, "pt": 263, "ru": 315, "zh": 16}
    for language, number in numbers.items():
        rows = read("xwinograd", language, real_data / "{task}")
        assert len(rows) == number and all("_" in row.query for row in rows)
    # The same questions with their blanks, as others have prepared them.
    sample = real_data / "mmmlu_xwino_sample"
    for language in ("en", "fr", "ja", "ru"):
        blanks = {row.query.split("\n")[0].removeprefix("Sentence: "): row
                  for row in read("xwinograd", language, real_data / "xwinograd")}
        for row in json.loads((sample / "xwinograd_for_mlrs" / f"{language}.json").read_text()):
            ours = blanks[row["sentence"].strip()]
            assert f"\n{ours.target}: {row['option' + row['answer']]}\n" in ours.query
    assert len(read("mmmlu", "bn", sample / "mmmlu_for_mlrs")) == 200
    assert read("mgsm", "sw", real_data / "mgsm")[0].target == "18"
    for language, word in QUESTIONS.items():
        row = read("mgsm", language, real_data / "mgsm")[0].query
        assert f"### Instruction:\n{word} " in row and row.endswith("\n\n### Response:\n")


@pytest.mark.parametrize("text, number", [
    ("It is -5.", "5.0"), ("so 1,234.50 in all", "1234.5"), ("none", "0.0"),
    ("16 - 3 - 4 = 9 eggs, 9 * 2 = $18", "18.0"), ("80 000", "0.0")])
def test_langbridges_authors_count_the_last_number_without_its_sign(text, number):
    assert last_unsigned(text) == number


def test_mgsm_is_asked_as_langbridges_authors_ask_it():
    """To the prompt's last character; the other form has a name of its own."""
    task = TASKS["mgsm"]
    assert task.prompt.format(query="Question: How many?") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nQuestion: How many?\n\n### Response:\n")
    assert task.max_new_tokens == 1024
    assert task.stop["fr"] == ("Question :", "[END]", "</s>", "<|im_end|>")
    settings = for_task(EvalConfig(), task, "sw")
    assert settings.max_new_tokens == 1024 and settings.stop[0] == "Swali:"
    assert for_task(EvalConfig(max_new_tokens=3, stop=("x",)), task, "sw").stop == ("x",)
    assert for_task(EvalConfig(), TASKS["xnli"]).max_new_tokens == 16
    assert TASKS["mgsm_step_by_step"].prompt.endswith("### Response: Let's think step by step.")
