"""DPG-Bench from pictures to scores: folders, cache, and a vision-language model with
random weights.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import layout
from eval.dpg_bench import __main__ as command
from eval.dpg_bench import answers, judges, pictures
from mmtensorar import files
from tests.helpers import pictures as pictures_of
from tests.helpers.fakes import write_tiny_vlm

COLORS = ("red", "lime", "blue", "white")
HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
)


class Reader(judges.Judge):
    """Answers yes if the question names the colour of the picture's first pixel, and
    counts the questions.
    """

    name = "reader"

    def __init__(self):
        self.asked = 0

    def ask(self, image, question):
        self.asked += 1
        named = [
            color
            for color in COLORS
            if Image.new("RGB", (1, 1), color).getpixel((0, 0)) == image.getpixel((0, 0))
        ]
        return "yes" if named and named[0] in question else "no"


@pytest.fixture
def judge(monkeypatch):
    found = Reader()
    monkeypatch.setattr(judges, "load", lambda name, device=None: found)
    return found


@pytest.fixture
def bench(tmp_path) -> Path:
    """Items a and 7, both with the questions: is it red, and if so, is it white?"""
    folder = tmp_path / "dpg_bench"
    (folder / "prompts").mkdir(parents=True)
    table = HEADER
    for item in ("a", "7"):
        (folder / "prompts" / f"{item}.txt").write_text(f"a picture of {item}\n")
        table += f"{item},t,,1,0,x,y,entity - whole (it),Is it red?\n"
        table += f"{item},t,,2,1,x,y,attribute - color (it),Is it white or red?\n"
    (folder / "dpg_bench.csv").write_text(table)
    return folder


@pytest.fixture
def grids(tmp_path) -> Path:
    for item, colors in {"a": ("red", "lime", "blue", "red"), "7": COLORS}.items():
        pictures.write_grid(
            [Image.new("RGB", (8, 8), color) for color in colors], tmp_path / "grids" / f"{item}.png"
        )
    return tmp_path / "grids"


def run(bench: Path, *arguments) -> int:
    return command.main([*map(str, arguments), "--bench", str(bench), "--device", "cpu"])


def test_grids_are_read_as_they_are_written(grids):
    """The order is top left, top right, bottom left, bottom right.

    With fewer samples the first ones are read.
    """
    (item, other), problems = pictures.survey(grids, ["7", "a"], num_samples=4, single=False)
    assert (item.id, other.id, problems) == ("7", "a", [])
    assert [sample.getpixel((3, 3)) for sample in item.samples(4)] == [
        Image.new("RGB", (1, 1), c).getpixel((0, 0)) for c in COLORS
    ]
    assert [sample.getpixel((0, 0)) for sample in item.samples(1)] == [(255, 0, 0)]


def test_from_grids_to_both_scores(bench, grids, judge, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(bench, "--images", grids, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.index("official: DPG-Bench score") < printed.index("corrected: DPG-Bench score")
    assert "judge: reader" in printed and "NOT the official table" in printed
    summary = json.loads((out / "summary.json").read_text())
    # The first question of the table (item a) is skipped in the official mode, but its
    # child names it.
    assert summary["official"]["failed"] == ["a"] and summary["official"]["dpg_score"] == 25
    assert summary["corrected"]["dpg_score"] == 37.5 and summary["items_found"] == 2
    assert summary["answers_given"] == {"yes": 7, "no": 9}
    # The other command can score the recorded answers again.
    arguments = [
        "score",
        "--answers",
        str(out / "answers.jsonl"),
        "--questions",
        str(bench / "dpg_bench.csv"),
    ]
    assert command.main([*arguments, "--judge", "reader", "--out", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["official"] == summary["official"] and again["corrected"] == summary["corrected"]


def test_an_interrupted_run_asks_nothing_twice(bench, grids, judge, tmp_path):
    """Also when it was killed in the middle of a line.

    Equal pictures count as one picture.
    """
    out = tmp_path / "out"
    assert run(bench, "--images", grids, "--out", out) == 0
    assert judge.asked == 4 * 2, "of eight samples, four are different"
    cache = out / "cache.jsonl"
    whole = cache.read_bytes()
    cache.write_bytes(whole[: -len(whole.splitlines()[-1]) // 2])
    first = (out / "summary.json").read_text()
    assert run(bench, "--images", grids, "--out", out) == 0
    assert judge.asked == 9 and cache.read_bytes() == whole and (out / "summary.json").read_text() == first
    judge.name = "another"
    assert run(bench, "--images", grids, "--out", out) == 0
    assert judge.asked == 17
    cache.write_text("{}\n")
    assert run(bench, "--images", grids, "--out", out) == 2


def missing(folder: Path) -> str:
    (folder / "a.png").unlink()
    return "item a has no picture"


def extra(folder: Path) -> str:
    Image.new("RGB", (8, 8)).save(folder / "b.png")
    return "b.png belongs to no item"


def twice(folder: Path) -> str:
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    return "a.png belongs to the same item as a.jpg"


def corrupt(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"no picture")
    return "a.png: unreadable image"


def closed(folder: Path) -> str:
    """Half of a JPEG, closed by an end marker; and one whose name says PNG."""
    (folder / "a.png").write_bytes(pictures_of.closed(pictures_of.encoded(pictures_of.photograph(), "JPEG")))
    return "a.png: unreadable image (truncated: its data ends early)"


def zeroed(folder: Path) -> str:
    picture = pictures_of.encoded(pictures_of.photograph(), "PNG")
    (folder / "a.png").write_bytes(pictures_of.zeroed(picture))
    return "a.png: unreadable image (the IDAT chunk has a wrong checksum)"


def odd(folder: Path) -> str:
    Image.new("RGB", (9, 8)).save(folder / "a.png")
    return "a.png: 9x8 pixels; expected a 2 x 2 grid"


@pytest.mark.parametrize("damage", [missing, extra, twice, corrupt, closed, zeroed, odd])
def test_invalid_pictures_and_options_are_errors(damage, bench, grids, judge, tmp_path, capsys):
    """With --allow-partial the rest is scored, and the score is marked."""
    sentence = damage(grids)
    out = tmp_path / "out"
    assert run(bench, "--images", grids, "--out", out) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("error: ") == 1 and not (out / "summary.json").exists()
    assert run(bench, "--images", grids, "--out", out, "--allow-partial") == 0
    printed, noted = capsys.readouterr()
    kind = {missing: "missing item", extra: "unknown item", twice: "surplus image"}.get(damage)
    assert f"official (PARTIAL, 1 {kind or 'unreadable image'})" in printed
    assert any(line.startswith(f"note: {grids}: ") and sentence in line for line in noted.splitlines())
    assert json.loads((out / "summary.json").read_text())["partial"]


@pytest.mark.parametrize(
    "names", [["b.png"], ["a.b.png", "a 1.jpg", "8.png"], ["A.png", "first.second.webp"]]
)
def test_pictures_of_unknown_prompts_fail_in_the_official_mode(names, bench, grids, judge, tmp_path, capsys):
    """They were left out of the list, where the official script prints them as failed.

    Scoring the recorded answers again gives the same lists.
    """
    (grids / "a.png").rename(grids / "a.webp")
    for name in names:
        Image.new("RGB", (8, 8)).save(grids / name)
    unknown = sorted({name.split(".")[0] for name in names} - {"a", "7"})
    out = tmp_path / "out"
    assert run(bench, "--images", grids, "--out", out, "--allow-partial") == 0
    assert f"left out: {', '.join(sorted([*unknown, 'a']))} ({len(unknown)} not in" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    # Item a fails because its first question is the skipped row of the table.
    assert summary["official"]["failed"] == sorted([*unknown, "a"])
    assert summary["official"]["unknown"] == unknown and summary["corrected"] is not None
    arguments = ["score", "--answers", out / "answers.jsonl", "--questions", bench / "dpg_bench.csv"]
    for number in ([], ["--num-images", "4"]):
        assert command.main([*map(str, arguments), *number, "--out", str(tmp_path / "again.json")]) == 0
        again = json.loads((tmp_path / "again.json").read_text())
        assert again["official"] == summary["official"] and again["corrected"] == summary["corrected"]


@pytest.mark.parametrize("item, name", [("x", "x"), ("A", "A"), (None, "00002")])
def test_generated_pictures_of_unknown_prompts_fail_too(bench, judge, tmp_path, item, name):
    """They have the item_id of their prompt, or without one the number of their
    folder.
    """
    folder = tmp_path / "generated"
    for number, item_id in enumerate(["7", "a", item]):
        for image in range(2):
            path = layout.image_path(folder, number, image)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(path)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps({"item_id": item_id, "prompt": "?"}))
    (folder / layout.RECORD).write_text(json.dumps({"num_images": 2, "sampling": {}}))
    arguments = ["--images", folder, "--out", tmp_path / "out", "--num-images", 2, "--allow-partial"]
    assert run(bench, *arguments) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["official"]["unknown"] == [name]
    assert summary["official"]["failed"] == sorted([name, "a"])


def generated(folder: Path, *rows: dict) -> Path:
    """A folder as --ckpt makes it, a red picture for each row."""
    for number, row in enumerate(rows):
        path = layout.image_path(folder, number, 0)
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(path)
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(row))
    (folder / layout.RECORD).write_text(json.dumps({"num_images": 1, "sampling": {}}))
    return folder


@pytest.mark.parametrize("num_made, num_asked", [(4, 2), (8, None), (2, 1)])
def test_generated_pictures_that_nothing_is_asked_about_are_named(
    bench, judge, tmp_path, capsys, num_made, num_asked
):
    """Of eight pictures a prompt, the last four were left out in silence."""
    folder = generated(tmp_path / "generated", *({"item_id": item, "prompt": "?"} for item in ("a", "7")))
    for number in range(2):
        for image in range(1, num_made):
            Image.new("RGB", (8, 8), "red").save(layout.image_path(folder, number, image))
    (folder / layout.RECORD).write_text(json.dumps({"num_images": num_made}))
    options = [] if num_asked is None else ["--num-images", num_asked]
    assert run(bench, "--images", folder, "--out", tmp_path / "out", *options) == 0
    num_left, first = 2 * (num_made - (num_asked or 4)), f"00000/samples/{num_asked or 4:05d}.png"
    assert f"left out {num_left} (after the first {num_asked or 4} of an item" in (
        noted := capsys.readouterr().err
    )
    assert f"): {first}" in noted


@pytest.mark.parametrize("places", [("a", "7", "7"), ("a", "a", "7"), ("7", "a", "7", "a")])
def test_an_item_that_two_generated_folders_have_is_named(bench, judge, tmp_path, capsys, places):
    """The last one replaced the others in silence."""
    rows = [{"item_id": item, "prompt": f"a picture of {item}"} for item in places]
    folder = generated(tmp_path / "generated", *rows)
    arguments = ["--images", folder, "--num-images", 1, "--out", tmp_path / "out"]
    assert run(bench, *arguments) == 2
    assert "metadata.jsonl belongs to the same item as 0000" in capsys.readouterr().err
    assert run(bench, *arguments, "--allow-partial") == 0
    assert f"(PARTIAL, {len(places) - 2} surplus prompt" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [("a picture of 7", "a dog"), ("", "x" * 500), ("a picture of 7.\n", "a")])
def test_generated_pictures_of_changed_prompts_are_named(bench, judge, tmp_path, capsys, texts):
    """The official script knows names of files only, so they are scored; not in
    silence.
    """
    rows = [{"item_id": item, "prompt": text} for item, text in zip(("7", "a"), texts, strict=True)]
    folder = generated(tmp_path / "generated", *rows)
    assert run(bench, "--images", folder, "--num-images", 1, "--out", tmp_path / "out") == 0
    noted = capsys.readouterr().err
    assert f'00001/metadata.jsonl has the prompt "{texts[1][:60]}' in noted
    assert ('00000/metadata.jsonl has the prompt "' in noted) == (texts[0] != "a picture of 7")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["changed_prompts"]) == 1 + (texts[0] != "a picture of 7")


def test_what_a_judge_says_besides_yes_and_no_is_named(bench, grids, judge, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judge, "ask", lambda image, question: "red" if "red?" in question else "yes")
    assert run(bench, "--images", grids, "--out", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert f"note: {grids}: 16 answers counted as no" in error and "'red' 16 times, first item a" in error


def test_an_unreadable_picture_fails_in_the_official_mode(bench, grids, judge, tmp_path):
    corrupt(grids)
    assert run(bench, "--images", grids, "--out", tmp_path / "out", "--allow-partial") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["official"]["failed"] == ["a"] and summary["official"]["unknown"] == []


def test_a_model_folder_is_scored(bench, ckpt, judge, tmp_path, capsys):
    """Pictures are generated, questions asked, and grids of the official script
    written; a second run makes nothing.
    """
    out = tmp_path / "out"
    assert run(bench, "--ckpt", ckpt, "--out", out) == 0
    assert "8 images made" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["items_found"] == 2
        and summary["num_images"] == 4
        and summary["generation"]["suite"] == "dpg_bench"
    )
    assert [row["item_id"] for _, row in files.read_json_lines(out / "answers.jsonl")] == ["a"] * 4 + [
        "7"
    ] * 4
    assert run(bench, "--ckpt", ckpt, "--out", out) == 0
    assert "0 images made" in capsys.readouterr().out
    asked = judge.asked
    assert run(bench, "--images", out, "--out", tmp_path / "other") == 0, "as after a run of several ranks"
    assert judge.asked > asked
    assert json.loads((tmp_path / "other" / "summary.json").read_text())["official"] == summary["official"]
    assert command.main(["grids", str(out), "--out", str(tmp_path / "grids2")]) == 0
    (tmp_path / "twice").mkdir()
    assert run(bench, "--images", tmp_path / "grids2", "--out", tmp_path / "twice") == 0
    assert json.loads((tmp_path / "twice" / "summary.json").read_text())["official"] == summary["official"]
    layout.image_path(out, 1, 2).unlink()
    assert run(bench, "--images", out) == 2
    assert "00001/samples/00002.png is missing" in capsys.readouterr().err


@pytest.mark.parametrize("present, refused", [("equal", False), ("another", True), ("damaged", True)])
def test_grids_replace_no_picture(tmp_path, capsys, present, refused):
    """Grids of a second model once replaced those of the first, in part when it had
    fewer prompts.
    """
    for number, color in enumerate(COLORS):
        path = layout.image_path(tmp_path / "model", 0, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(path)
    (tmp_path / "model" / "00000" / "metadata.jsonl").write_text('{"item_id": "a", "prompt": "?"}')
    arguments = ["grids", str(tmp_path / "model"), "--out", str(tmp_path / "grids")]
    if present == "equal":
        assert command.main(arguments) == 0
    else:
        (tmp_path / "grids").mkdir()
        Image.new("RGB", (16, 16), "red").save(tmp_path / "grids" / "a.png")
    if present == "damaged":
        (tmp_path / "grids" / "a.png").write_bytes(b"")
    before = (tmp_path / "grids" / "a.png").read_bytes()
    assert command.main(arguments) == 2 * refused
    assert ("a.png" in capsys.readouterr().err) == refused
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["a.png"]
    assert (tmp_path / "grids" / "a.png").read_bytes() == before


def test_mistakes_are_sentences(bench, grids, tmp_path, capsys):
    (tmp_path / "vlm").mkdir()
    for given, sentence in (
        (["--images", grids, "--judge", tmp_path / "vlm"], "--judge: "),
        (["--images", grids, "--num-images", 5], "--num-images is 5; a file holds 4"),
        (["--images", grids, "--num-images", 0], "--num-images is 0; expected 1 or more"),
        (["--images", grids, "--judge", "mplug"], "--judge mplug needs ModelScope"),
    ):
        assert run(bench, *given) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1, error
    assert run(tmp_path, "--images", grids) == 2
    assert (
        "dpg_bench.csv is missing; expected the folder dpg_bench/ of the ELLA repository"
        in capsys.readouterr().err
    )


# ---- judges --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> judges.Judge:
    folder = tmp_path_factory.mktemp("vlm")
    write_tiny_vlm(folder)
    return judges.load(str(folder), "cpu")


def test_an_answer_does_not_depend_on_its_batch(tiny):
    """Padding to the longest question changes nothing; the answer depends on the
    picture or on the question.
    """
    questions = ["is there a circle ?", "red ?", "is the circle red or is there a blue circle ?"]
    found = {}
    for color in (*COLORS, "black"):
        image = Image.new("RGB", (8, 8), color)
        found[color] = tiny.ask_all(image, questions)
        assert [tiny.ask(image, question) for question in questions] == found[color]
    assert len({answer for given in found.values() for answer in given}) > 1, found
    assert str(tiny.name).count("float32") == 1


def test_answers_of_chat_models():
    given = {
        "Yes": "yes",
        "yes.": "yes",
        " No, it": "no",
        '"Yes"': "yes",
        "Yesterday": "Yesterday",
        "": "",
        "I think yes": "I think yes",
    }
    assert {text: judges.plain(text) for text in given} == given


def test_the_cache_distinguishes_pictures():
    """The key of the cache is made of pixels and size, not of the file."""
    one = Image.new("RGB", (2, 8))
    assert answers.image_hash(one) == answers.image_hash(one.copy())
    assert answers.image_hash(one) != answers.image_hash(Image.new("RGB", (8, 2)))


def test_a_model_without_a_chat_template_is_refused(tiny, tmp_path):
    write_tiny_vlm(tmp_path)
    for path in tmp_path.glob("*template*"):
        path.unlink()
    config = json.loads((tmp_path / "processor_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no chat template"):
        judges.load(str(tmp_path), "cpu")
    assert torch.is_grad_enabled()
