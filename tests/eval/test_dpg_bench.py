"""DPG-Bench: official numbers with all their quirks, and corrected numbers, on tables
worked out by hand.
"""

import json
from pathlib import Path

import pytest

from eval.dpg_bench import __main__ as command
from eval.dpg_bench import recorded, report, score
from eval.dpg_bench.score import Question, corrected, official

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
)


def question(item: str, number: int, parents: str = "0", category: str = "entity - whole") -> Question:
    return Question(item, number, tuple(map(int, parents.split(","))), category, "?")


def said(*pictures: str) -> list[dict[int, str]]:
    """Answers: one text per picture, with y or n for every question, starting at
    question 1.
    """
    return [
        {i: "yes" if letter == "y" else "no" for i, letter in enumerate(picture, 1)} for picture in pictures
    ]


SKIPPED = question("first", 1)  # skipped in the official mode


def test_a_question_counts_while_its_parents_do():
    """Down the table: 2 fails with 1, and 3 with 2; the picture scores 1 of 4."""
    rows = [SKIPPED, question("a", 1), question("a", 2, "1"), question("a", 3, "2"), question("a", 4)]
    assert official(rows, {"a": said("nyyy", "yyyy")}).per_prompt == {"a": [0.25, 1.0]}
    assert official(rows, {"a": said("nyyy", "yyyy")}).overall == 62.5


def test_a_parent_further_down_counts_late():
    """The official scorer has not zeroed that parent yet; the corrected scorer looks at
    all ancestors.
    """
    rows = [SKIPPED, question("a", 1, "2"), question("a", 2, "3"), question("a", 3)]
    assert official(rows, {"a": said("yyn")}).per_prompt == {"a": [1 / 3]}
    assert corrected(rows[1:], {"a": said("yyn")}).per_prompt == {"a": [0.0]}
    circle = [question("a", 1, "2"), question("a", 2, "1")]
    assert corrected(circle, {"a": said("yn")}).per_prompt == {"a": [0.0]}


def test_a_missing_parent_drops_the_prompt_when_it_is_reached():
    """It is not reached after a parent that is 0.

    So whether a prompt fails depends on the answers.
    """
    rows = [SKIPPED, question("a", 1), question("a", 2, "1,9"), question("b", 1)]
    answers = {"a": said("yy"), "b": said("y")}
    assert official(rows, answers).failed == ["a"] and official(rows, answers).overall == 100
    assert official(rows, answers | {"a": said("ny")}).failed == []
    whole = corrected(rows, answers | {"first": said("y")})
    assert whole.unknown_parents == 1 and whole.failed == [] and whole.per_prompt["a"] == [1.0]


def test_the_first_row_is_skipped_and_a_later_block_replaces_an_earlier_one():
    rows = [
        question("a", 1),
        question("a", 2),
        question("b", 1),
        question("b", 2),
        question("c", 1),
        question("b", 1),
    ]
    scores = official(rows, {"a": said("ny"), "b": said("yn")})
    assert scores.per_prompt == {"a": [1.0], "b": [1.0]}
    everything = corrected(rows, {"a": said("ny"), "b": said("yn"), "c": said("y")})
    # Question 1 of b occurs twice in the table.
    assert everything.per_prompt == {"a": [0.5], "b": [2 / 3], "c": [1.0]}


def test_categories():
    """Official: the last picture, before the dependency rule.

    Corrected: all pictures, after it.
    """
    rows = [
        SKIPPED,
        question("a", 1, "0", "entity - whole"),
        question("a", 2, "1", "attribute - color"),
        question("a", 3),
    ]
    scores = official(rows, {"a": said("yyy", "nyy")})
    assert scores.detailed == {"attribute - color": (100.0, 1), "entity - whole": (50.0, 2)}
    assert scores.broad == {"attribute": (100.0, 1), "entity": (50.0, 2)}
    scores = corrected(rows[1:], {"a": said("yyy", "nyy")})
    assert scores.detailed == {"attribute - color": (50.0, 2), "entity - whole": (75.0, 4)}


@pytest.mark.parametrize("answer", ["Yes", "yes.", " yes", "yes it is", ""])
def test_only_yes_is_yes(answer):
    assert (
        official([SKIPPED, question("a", 1), question("a", 2)], {"a": [{1: answer, 2: "yes"}]}).overall == 50
    )


def test_the_corrected_mode_drops_nothing():
    rows = [question("a", 1), question("b", 1)]
    with pytest.raises(ValueError, match="1 item of the table without pictures: b"):
        corrected(rows, {"a": said("y")})
    with pytest.raises(ValueError, match="1 item with fewer pictures than the 2 of others: b"):
        corrected(rows, {"a": said("y", "y"), "b": said("y")})
    with pytest.raises(ValueError, match="1 item that the table does not have: c"):
        corrected(rows, {"a": said("y"), "b": said("y"), "c": said("y")})
    with pytest.raises(ValueError, match="item b, picture 0: no answer to question 1"):
        corrected(rows, {"a": said("y"), "b": [{}]})


def write(folder: Path, table: str, *answers: dict) -> list[str]:
    (folder / "table.csv").write_text(HEADER + table)
    (folder / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answers))
    return ["score", "--answers", str(folder / "answers.jsonl"), "--questions", str(folder / "table.csv")]


ROWS = "a,t,,1,0,x,y,entity - whole (cat),Is there a cat?\n" * 2


def test_both_modes_are_printed_with_the_table_and_the_judge(tmp_path, capsys):
    """The id of the table is the id that git prints for the file."""
    arguments = write(tmp_path, ROWS, {"item_id": "a", "image": 0, "answers": {"1": "yes"}})
    assert command.main([*arguments, "--judge", "a friend", "--out", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.index("official: DPG-Bench score 100.0000") < printed.index(
        "corrected: DPG-Bench score 100.0000"
    )
    assert "NOT the official table" in printed and "judge: a friend" in printed
    assert json.loads((tmp_path / "out.json").read_text())["corrected"]["dpg_score"] == 100
    (tmp_path / "hello").write_text("hello\n")
    assert report.git_blob_id(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_answers_to_part_of_the_table_are_marked(tmp_path, capsys):
    table = ROWS + "b,t,,1,0,x,y,entity - whole (cat),Is there a cat?\n"
    arguments = write(tmp_path, table, {"item_id": "a", "image": 0, "answers": {"1": "yes"}})
    assert command.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
    assert "official (PARTIAL, 1 missing item): " in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["partial"] == ["item b has no answers"]


def an_answer(item: str = "a", image: int = 0, **answers: str) -> dict:
    """answers: _1="yes" is the answer to question 1."""
    return {"item_id": item, "image": image, "answers": {key[1:]: text for key, text in answers.items()}}


@pytest.mark.parametrize(
    "answers, noted",
    [
        (
            [an_answer(_1="Yes.")],
            ["1 answer counted as no", "'Yes.' 1 time, first item a picture 0 question 1"],
        ),
        (
            [an_answer(_1=text, image=image) for image, text in enumerate(["maybe", "", "yes", "maybe"])],
            [
                "3 answers counted as no",
                "'maybe' 2 times, first item a picture 0 question 1; '' 1 time, first",
            ],
        ),
        (
            [an_answer(_1=text, image=image) for image, text in enumerate(["No", " yes", "ja", "YES it is"])],
            ["4 answers counted as no", "; and 1 more\n"],
        ),
        ([an_answer(_1="yes", _77="yes")], ["1 answer left out", "item a picture 0 question 77\n"]),
        (
            [an_answer(_1="no", _2="no", _3="Yes", image=image) for image in range(3)],
            [
                "6 answers left out",
                "item a picture 0 question 2; item a picture 0 question 3; ",
                "; and 3 more",
            ],
        ),
        ([an_answer(_1="yes"), an_answer("q", _1="Yes.")], ["item q is not in the table"]),
        ([an_answer(_1="yes"), an_answer("q"), an_answer("é")], ["q is not in the table, item é is not"]),
        ([an_answer(_1="yes"), an_answer(_1="no", image=1)], []),
    ],
)
def test_answers_that_are_not_understood_are_counted_and_named(tmp_path, capsys, answers, noted):
    """They count as no, as in the official script, or are left out: once without a
    word, and without the name of the file.
    """
    arguments = write(tmp_path, ROWS, *answers)
    assert command.main([*arguments, "--out", str(tmp_path / "out.json")]) == 0
    error = capsys.readouterr().err
    assert all(part in error for part in noted) and bool(error) == bool(noted), error
    assert all(line.startswith(f"note: {tmp_path / 'answers.jsonl'}: ") for line in error.splitlines())
    given = [answer["answers"].get("1") for answer in answers if answer["item_id"] == "a"]
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["official"]["dpg_score"] == 100 * given.count("yes") / len(given)
    assert sum(scores["answers_given"].values()) == sum(
        len(a["answers"]) for a in answers if a["item_id"] == "a"
    )


def test_an_item_of_the_skipped_row_is_not_unknown(tmp_path, capsys):
    """It fails in the official mode, but the table has it."""
    table = "z,t,,1,0,x,y,entity - whole (cat),Is there a cat?\n" + ROWS
    assert command.main(write(tmp_path, table, an_answer("z", _1="yes"), an_answer(_1="yes"))) == 0
    printed = capsys.readouterr().out
    assert "1 prompt; 1 left out: z\n" in printed and "     1 question\n" in printed


@pytest.mark.parametrize(
    "table, answer, sentence",
    [
        (
            ROWS,
            {"item_id": "a", "image": 1, "answers": {"1": "yes"}},
            "item a has pictures 1; expected them from 0 on",
        ),
        (ROWS, {"item_id": "a", "image": 0, "answers": {"one": "yes"}}, "line 1: expected answers as"),
        (ROWS, {"item_id": 7, "image": 0, "answers": {}}, "line 1: expected item_id, image"),
        (
            ROWS,
            {"item_id": "a", "image": 0, "answers": {"1": "no", "01": "yes"}},
            "line 1: a question has two",
        ),
        (
            ROWS,
            {"item_id": "a", "image": 0, "answers": {}},
            "jsonl: item a, picture 0: no answer to question 1",
        ),
        ("a,t,,one,0,x,y,z,?\n", {"item_id": "a", "image": 0, "answers": {}}, "line 2: proposition_id 'one'"),
        ("a,t\n", {"item_id": "a", "image": 0, "answers": {}}, "line 2: the row ends before proposition_id"),
        ("", {"item_id": "a", "image": 0, "answers": {}}, "table.csv: no questions in it"),
    ],
)
def test_mistakes_are_sentences(table, answer, sentence, tmp_path, capsys):
    assert command.main(write(tmp_path, table, answer)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_table_of_other_columns_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column item_id, proposition_id, dependency, tuple"):
        score.read_rows(tmp_path / "t.csv")


A_ROW = "{},t,,{},0,x,y,entity - whole (cat),{}\n"


@pytest.mark.parametrize(
    ("rows", "line", "sentence"),
    [
        ([("a", 1, "is it red, or blue?")], 2, "10 cells, but the header has 9"),
        ([("a", 1, "a cat?"), ("a", 2, '"red", "blue", or green?')], 3, "11 cells"),
        ([("a", 1, '"is it red?'), ("a", 2, "x, or y"), ("b", 1, 'a dog?"')], 2, "a quote opens in this row"),
        ([("a", 1, '"is it red?'), ("a", 2, 'red, or blue?"'), ("b", 1, "a dog?")], 2, "a quote opens"),
        ([("a", 1, "a cat?"), ("b", 1, '"red?'), ("b", 2, "x, y, z"), ("b", 3, 'no"')], 3, "a quote opens"),
    ],
)
def test_commas_and_quotes_lose_no_question(tmp_path, rows, line, sentence):
    """A question was cut at its comma, and a stray quote swallowed the rows after
    it.
    """
    (tmp_path / "t.csv").write_text(HEADER + "".join(A_ROW.format(*row) for row in rows))
    with pytest.raises(ValueError, match=rf"t\.csv line {line}: .*{sentence}"):
        score.read_rows(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "text", ['"is it red, or blue?"', '"""red"", or blue?"', '"red,\nor blue?"', '"a" b']
)
def test_quoted_questions_stay_whole(tmp_path, text):
    (tmp_path / "t.csv").write_text(HEADER + A_ROW.format("a", 1, text) + A_ROW.format("a", 2, "a cat?"))
    rows = score.read_rows(tmp_path / "t.csv")
    assert [row.id for row in rows] == [1, 2] and rows[0].text.endswith(text[-3:].strip('"'))


@pytest.mark.parametrize("digits", [19, 400, 5000])
def test_the_id_of_a_question_has_few_digits(tmp_path, digits):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"item_id": "a", "image": 0, "answers": {"9" * digits: "yes"}}) + "\n")
    with pytest.raises(ValueError, match=r"answers.jsonl line 1: expected answers as"):
        recorded.read_answers(path)
