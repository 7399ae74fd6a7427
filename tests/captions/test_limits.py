"""One long caption once took the memory of a run: every row of a batch is padded to the
longest prompt.

Prompts have a limit. What exceeds it is cut in the same way in training and sampling,
or refused, and every command names it with both numbers.
"""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_tools import check_shards, encode_text
from mmtensorar import backbones, generate
from mmtensorar.backbones import janus
from mmtensorar.captions import limits
from mmtensorar.captions.encoders import ClassNumbers, T5Features
from mmtensorar.data import loader
from mmtensorar.image_tokenizers import janus_vq
from mmtensorar.model.conditions import Condition
from mmtensorar.pipeline import Generator
from mmtensorar.recipe import Data, Recipe, Run, Train
from mmtensorar.training import plan, sample_grid
from mmtensorar.training.run import memory_errors_named
from tests.helpers.fakes import write_tiny_janus
from tests.helpers.runs import rows, run
from tests.helpers.shards import write_shards

SPECIAL = ["<pad>", "<bos>", "<begin_of_image>"]
LIMIT = 100

# Kinds of text, each longer than LIMIT tokens of bytes.
LONG = {
    "sentence": "a red circle left of a blue star, " * 600,  # 20,000 characters
    "one endless word": "".join(chr(97 + i * i % 26) for i in range(5000)),
    "emoji, four tokens each": "\N{GRINNING FACE}\N{PARTY POPPER}" * 300,
    "Chinese, three tokens each": "红色的圆圈在蓝色的星星左边" * 40,
    "white space within": "red" + " \n\t" * 200 + "circle",
    "names of special tokens": "<begin_of_image> <bos> " * 50,
    "a little too long": "x" * LIMIT,
}


def write_byte_tokenizer(folder) -> None:
    """A text tokenizer with one token for each byte, and merges for "red"; its limit is
    unset.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, "re", "red"])}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[("r", "e"), ("re", "d")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(SPECIAL)
    names = {"pad_token": "<pad>", "bos_token": "<bos>"}
    PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)


def encoder_of(folder, **settings):
    return backbones.caption_encoder(janus.Config(name="janus", path=str(folder), **settings))


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    """A tiny Janus with 256 positions, of which 16 are image tokens; each word is one
    token.
    """
    folder = tmp_path_factory.mktemp("words")
    write_tiny_janus(folder)
    return folder


def row_of(encoder, caption: str) -> list[int]:
    """The prompt's ids, without padding."""
    condition = encoder([caption])
    return condition.values[condition.mask].tolist()


# ---- Janus: token ids ------------------------------------------------------------------------


@pytest.mark.parametrize("caption", ["", "a red circle", "红 circle \N{GRINNING FACE}", "a" * 40])
def test_a_prompt_within_the_limit_keeps_its_tokens(bytes_folder, caption):
    """Also when it has exactly as many as the limit allows."""
    whole = row_of(encoder_of(bytes_folder, max_prompt_tokens=10**6), caption)
    at_the_limit = encoder_of(bytes_folder, max_prompt_tokens=max(len(whole), 60))
    assert row_of(at_the_limit, caption) == whole and at_the_limit.excess(caption) is None


@pytest.mark.parametrize("kind", LONG)
def test_a_long_prompt_is_exactly_that_of_a_shorter_caption(bytes_folder, kind):
    """The template stays whole, no character is cut in two, and company changes
    nothing.
    """
    encoder, caption = encoder_of(bytes_folder, max_prompt_tokens=LIMIT), LONG[kind]
    row, empty = row_of(encoder, caption), row_of(encoder, "")
    head, tail = len("<|User|>: ") + 1, len("\n\n<|Assistant|>:") + 1
    assert row[:head] == empty[:head] and row[-tail:] == empty[-tail:]
    kept = encoder.text_tokenizer.decode(row[head:-tail], clean_up_tokenization_spaces=False)
    assert kept and encoder._plain(caption).startswith(kept), "the beginning, in whole characters"
    assert row == row_of(encoder_of(bytes_folder, max_prompt_tokens=10**6), kept)
    if kind != "white space within":  # white space at the new end goes, as at the end of any caption
        assert LIMIT - 4 < len(row) <= LIMIT
    together = encoder(["a red circle", caption, "红"])
    assert together.values.shape[1] <= LIMIT and together.values[1][together.mask[1]].tolist() == row
    excess = encoder.excess(caption)
    whole = len(encoder_of(bytes_folder, max_prompt_tokens=10**6)([caption]).values[0])
    assert (excess.num_tokens, excess.max_tokens, excess.unread) == (whole, LIMIT, 0) or excess.unread


@pytest.mark.parametrize(
    "text", ["red circle " * 10**5, "x" * 10**6, "\N{GRINNING FACE}" * 10**6, "\n" * 10**6]
)
def test_a_text_of_a_megabyte_is_read_only_as_far_as_needed(bytes_folder, monkeypatch, text):
    """A megabyte of emojis is 4 million tokens, of which the tokenizer made 700 MB."""
    encoder, lengths = encoder_of(bytes_folder, max_prompt_tokens=LIMIT), []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda text: lengths.append(len(text)) or encode(text))
    assert row_of(encoder, text)[-1] == SPECIAL.index("<begin_of_image>")
    excess = encoder.excess(text)
    assert max(lengths) <= limits.CHARS_PER_TOKEN * LIMIT
    assert excess.num_tokens > LIMIT and excess.unread == len(text) - limits.CHARS_PER_TOKEN * LIMIT
    assert str(excess.num_tokens) in str(excess) and str(LIMIT) in str(excess)


@pytest.mark.parametrize("gap", [" ", "\n", "red "])
def test_white_space_is_not_the_end_of_a_text(words_folder, gap):
    """This tokenizer drops white space, so a word after 100,000 spaces is still within
    the limit.
    """
    encoder = encoder_of(words_folder)
    text = "red " + gap * 10**5 + "circle"
    if gap == "red ":
        assert encoder.excess(text).num_tokens > 240
    else:
        assert encoder.excess(text) is None and row_of(encoder, text) == row_of(encoder, "red circle")


@pytest.mark.parametrize("told, wanted, expected", [(None, None, 240), (50, None, 50), (50, 90, 90)])
def test_the_limit_is_the_recipes_or_the_models(words_folder, tmp_path, told, wanted, expected):
    """Positions left by the image tokens, and what the text tokenizer's file says; at
    most 256.
    """
    write_tiny_janus(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"model_max_length": told} if told else {})))
    section = janus.Config(name="janus", path=str(tmp_path), max_prompt_tokens=wanted)
    encoder = backbones.caption_encoder(section)
    assert encoder(["red " * 1000]).values.shape == (1, expected)
    assert backbones.load(section, weights=False).max_prefix_len == expected, "which the plan counts"


def test_without_a_configuration_the_limit_is_256(bytes_folder):
    assert encoder_of(bytes_folder)(["x" * 1000]).values.shape == (1, 256)


@pytest.mark.parametrize(
    "wanted, expected", [(241, "240 or fewer"), (10**6, "240 or fewer"), (8, "9 or more")]
)
def test_a_limit_that_the_model_cannot_have_is_refused(words_folder, wanted, expected):
    with pytest.raises(ValueError, match=f"backbone.max_prompt_tokens is {wanted}.*{expected}"):
        encoder_of(words_folder, max_prompt_tokens=wanted)


# ---- LlamaGen: features of a text encoder ----------------------------------------------------


@pytest.mark.parametrize(
    "caption", ["a red circle a red circle", "red " * 5000, "red " + "x" * 10**5 + " a a a a"]
)
def test_captions_of_t5_are_named_when_they_are_cut(t5_folder, caption):
    """Cutting at 5 slots was always there, but in silence. The end token stays."""
    encoder = T5Features(str(t5_folder), num_slots=5, dim=6, cleaning="none")
    assert encoder.excess("a red circle a") is None
    assert encoder.excess(caption).max_tokens == 5 and encoder.excess(caption).num_tokens >= 6
    (cut,) = encoder.features([caption])
    assert len(cut) == 5


def test_what_the_cleaning_does_not_read_is_named(t5_folder):
    """It reads 2,048 characters: of an address without spaces nothing is left, and yet
    words follow.
    """
    encoder = T5Features(str(t5_folder), num_slots=5, dim=6, cleaning="original")
    excess = encoder.excess("http://" + "x" * 3000 + " a red circle")
    assert excess.unread == 3020 - 2048 and str(excess.unread) in str(excess)
    assert encoder.excess("a red") is None and ClassNumbers(3).excess("2") is None


def test_encoding_into_shards_counts_and_names_what_is_cut(t5_folder, tmp_path, words_folder, capsys):
    folder = write_set(tmp_path, words_folder, "red " * 5000)
    options = ["--text-encoder", str(t5_folder), "--caption-cleaning", "lower", "--max-tokens", "5"]
    assert encode_text.main([str(folder), *options]) == 0
    printed = capsys.readouterr().err
    assert "sample 01: the caption has " in printed and "(limit 5)" in printed
    assert "1 caption encoded now was longer than --max-tokens" in printed


# ---- shards and training ---------------------------------------------------------------------


def write_set(tmp_path, words_folder, caption: str):
    """Four samples; the second one, with key 01, has the caption."""
    section = SimpleNamespace(name="janus_vq", path=str(words_folder / "vq"))
    captions = (("a red circle", caption), ("a green circle", "a red square"))
    write_shards(tmp_path / "set", janus_vq.load(section), captions)
    return tmp_path / "set"


def stream_of(folder, encoder, **data):
    recipe = SimpleNamespace(
        run=Run(name="test"),
        data=Data(shards=str(folder), batch_size=4, shuffle=0, **data),
        train=Train(steps=1),
    )
    return recipe, loader.stream(recipe, encoder, rank=0, world_size=1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["sentence", "one endless word", "emoji, four tokens each"])
def test_training_cuts_one_long_caption_among_many_and_names_it(
    words_folder, bytes_folder, tmp_path, kind, num_workers
):
    """The batch is padded to the limit at most, and the other rows keep their
    tokens.
    """
    folder = write_set(tmp_path, words_folder, LONG[kind])
    encoder = encoder_of(bytes_folder, max_prompt_tokens=LIMIT)
    recipe, batches = stream_of(folder, encoder, num_workers=num_workers)
    batch = next(batches)
    assert LIMIT - 4 < batch.condition.mask.shape[1] <= LIMIT
    (sentence,) = batch.cut
    assert sentence.startswith(f"{folder / '00000.tar'}: sample 01") and f"(limit {LIMIT})" in sentence
    assert str(encoder.excess(LONG[kind]).num_tokens) in sentence
    for row, name in enumerate(batch.names):
        if "sample 00" in name:
            assert batch.condition.values[row][batch.condition.mask[row]].tolist() == row_of(
                encoder, "a red circle"
            )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["one endless word", "Chinese, three tokens each", "a little too long"])
def test_a_refused_prompt_is_a_damaged_sample(words_folder, bytes_folder, tmp_path, kind, num_workers):
    """It stops the run by name, or the next sample replaces it, as data.on_error
    says.
    """
    folder = write_set(tmp_path, words_folder, LONG[kind])
    encoder = encoder_of(bytes_folder, max_prompt_tokens=LIMIT)
    settings = {"long_prompts": "refuse", "num_workers": num_workers}
    _, batches = stream_of(folder, encoder, **settings)
    with pytest.raises(ValueError, match=rf"00000.tar: sample 01: the prompt has \d+ tokens.*limit {LIMIT}"):
        next(batches)
    _, batches = stream_of(folder, encoder, on_error="skip", **settings)
    (batch,) = islice(batches, 1)
    assert not batch.cut and len(batch.skipped) == 1 and "sample 01: the prompt has" in batch.skipped[0]
    recipe, _ = stream_of(folder, encoder, validation=str(folder), **settings)
    with pytest.raises(ValueError, match="sample 01: the prompt has"):
        list(loader.validation_batches(recipe, encoder, rank=0, world_size=1))


def test_sample_prompts_are_checked_before_training(bytes_folder, capsys):
    encoder = encoder_of(bytes_folder, max_prompt_tokens=LIMIT)

    def recipe(sample_every: int, long_prompts: str):
        train = Train(steps=1, sample_every=sample_every, sample_prompts=["red", LONG["sentence"]])
        data = Data(shards="none", batch_size=1, long_prompts=long_prompts)
        return SimpleNamespace(sampler=SimpleNamespace(per_factor=lambda _: None), train=train, data=data)

    sample_grid.check(recipe(0, "refuse"), 1, encoder)
    with pytest.raises(ValueError, match="train.sample_prompts: prompt 2 has"):
        sample_grid.check(recipe(1, "refuse"), 1, encoder)


@pytest.mark.launch
def test_a_run_records_what_it_cuts(bench, tmp_path):
    """In the log, in cut_prompts.jsonl, and at the end; a refused sample stops the run
    with one sentence.
    """
    folder = write_set(tmp_path, bench / "janus", "red " * 5000)
    data = [f"data.shards={folder}", f"data.validation={folder}", "train.validate_every=4"]
    done = run(bench, "run.name=cut", *data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sample 01: the prompt has 5008 tokens (limit 240), so it is cut" in done.stdout
    recorded = [json.loads(line) for line in (bench / "runs/cut/cut_prompts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in recorded] == [1, 2, 3, 4, 4] and "sample 01" in recorded[0]["problem"]
    logged = rows(bench, "cut")
    assert [row["num_cut"] for row in logged] == [1, 2, 3, 4] and logged[-1]["validation_num_cut"] == 1
    assert max(row["prompt_tokens"] for row in logged) == 240
    done = run(bench, "run.name=refused", *data, "data.long_prompts=refuse")
    assert done.returncode == 2 and "sample 01: the prompt has 5008 tokens (limit 240)" in done.stderr
    done = run(
        bench,
        "run.name=replaced",
        data[0],
        "data.long_prompts=refuse",
        "data.on_error=skip",
        "data.max_skipped=1",
    )
    assert done.returncode == 0 and rows(bench, "replaced")[-1]["num_skipped"] == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("err == 0. you can't allocate memory: 60 bytes"),
    ],
)
def test_a_full_memory_names_the_longest_prompt(error):
    """It was a traceback that named no sample. Other errors stay what they are."""
    mask = torch.tensor([[False, True], [True, True]])
    condition = Condition(torch.ones(2, 2), mask)
    batch = loader.Batch(torch.zeros(2, 1, 1), condition, mask[0], ("a.tar: sample 1", "a.tar: sample 2"), ())
    with pytest.raises(OSError, match="step 3, with 2 samples.*the 2 prompt tokens of a.tar: sample 2"):
        with memory_errors_named(3, batch):
            raise error
    with pytest.raises(RuntimeError, match="shape"), memory_errors_named(3, batch):
        raise RuntimeError("wrong shape")


def test_checking_shards_counts_what_is_too_long(words_folder, tmp_path, capsys):
    folder = write_set(tmp_path, words_folder, "red " * 5000)
    settings = {
        "run": {"name": "x"},
        "backbone": {"name": "janus", "path": str(words_folder)},
        "image_tokenizer": {"name": "janus_vq", "path": str(words_folder / "vq")},
        "data": {"shards": str(folder), "batch_size": 1},
        "train": {"steps": 1},
    }
    recipe, report = tmp_path / "recipe.yaml", tmp_path / "report.json"
    recipe.write_text(json.dumps(settings))
    check_shards.main([str(folder), "--workers", "1", "--recipe", str(recipe), "--report", str(report)])
    printed = capsys.readouterr()
    assert "longest caption 19999 characters (sample 01), 1 prompt longer" in printed.out
    assert "sample 01: the prompt has 5008 tokens (limit 240)" in printed.err
    written = json.loads(report.read_text())
    assert [row["key"] for row in written["too_long"]] == ["01"]
    assert written["longest_captions"][0] == {"shard": "00000.tar", "key": "01", "characters": 19999}


# ---- plan and sampling -----------------------------------------------------------------------


@pytest.mark.plan
def test_the_plan_counts_prompts_as_long_as_the_limit(words_folder, tmp_path):
    """Memory is that of the worst batch; FLOPs are given for a typical and for the
    longest prompt.
    """
    settings = {
        "run": {"name": "x"},
        "backbone": {"name": "janus", "path": str(words_folder), "max_prompt_tokens": 50},
        "image_tokenizer": {"name": "janus_vq", "path": str(words_folder / "vq")},
        "tensorar": {"num_heads": 2},
        "data": {"shards": "none", "batch_size": 8},
        "train": {"steps": 1},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    printed = plan.report(Recipe.load(recipe))
    assert "FLOPs with 32 prompt tokens" in printed and "FLOPs with 50, the most" in printed
    assert "padded to 50 tokens" in printed
    shorter = Recipe.load(recipe, ["backbone.max_prompt_tokens=20"])
    assert plan.activation_bytes(shorter, [8])[8] < plan.activation_bytes(Recipe.load(recipe), [8])[8]
    assert "FLOPs with 20 prompt tokens" in plan.report(shorter, activations=False), "never beyond the limit"


LONG_PROMPTS = ["red " * 300, "x " * 1000, "\N{GRINNING FACE} " * 300]


@pytest.mark.parametrize("prompt", LONG_PROMPTS)
def test_generate_warns_with_both_numbers(ckpt, tmp_path, capsys, prompt):
    command = ["--ckpt", str(ckpt), "--device", "cpu", "--num-images", "2", "--out", str(tmp_path / "out")]
    assert generate.main([*command, "--prompt", prompt, "--prompt", "a red circle"]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert f"has {len(prompt.split()) + 8} tokens (limit 240)" in warning


def test_of_many_long_prompts_a_few_are_named_and_all_counted(ckpt, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{'red ' * (300 + number)}\n" for number in range(7)))
    command = ["--ckpt", str(ckpt), "--device", "cpu", "--batch-size", "3", "--out", str(tmp_path / "out")]
    assert generate.main([*command, "--prompts-file", str(file)]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 6 and "7 prompts are cut in all" in warnings[-1]


def test_a_cut_prompt_draws_the_picture_of_the_shorter_one(ckpt):
    """Training and sampling cut alike, so a model sees what it was trained on."""
    generator = Generator.load(ckpt, device="cpu")
    codes = [generator.decode([prompt], [0]).codes for prompt in ("red " * 5000, "red " * 232)]
    assert torch.equal(*codes)


def test_a_model_folder_of_before_the_limit_loads(ckpt, tmp_path):
    """Its recipe has neither setting."""
    saved = Recipe.load(ckpt / "recipe.yaml").model_dump(mode="json")
    del saved["backbone"]["max_prompt_tokens"], saved["data"]["long_prompts"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(saved))
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.data.long_prompts == "cut" and recipe.backbone.max_prompt_tokens is None
