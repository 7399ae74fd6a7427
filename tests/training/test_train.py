"""The training command: resuming is exact, ZeRO-3 equals plain training, errors are one
sentence.
"""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mmtensorar import backbones
from mmtensorar.checkpoints import model_folder
from mmtensorar.data import loader
from mmtensorar.data.members import encode_codes
from mmtensorar.data.sample_order import Order
from mmtensorar.data.shards import Manifest, Sample, iterate_tar, write_tar
from mmtensorar.recipe import Recipe
from mmtensorar.training import run_log
from tests.helpers.fakes import write_tiny_janus
from tests.helpers.orders import location
from tests.helpers.runs import (
    ALIKE,
    NUM_CODES,
    SIDE,
    TRAIN,
    assert_close,
    cut,
    endless,
    finish,
    finish_ranks,
    fork_ranks,
    launch,
    numbers,
    rows,
    run,
    signal_after_a_step,
)

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.launch

EMA = "train.ema_decay=0.6"


@pytest.fixture(scope="module")
def whole_run(bench):
    done = run(bench, "run.name=whole", "train.monitors=[tensorboard, csv]")
    assert done.returncode == 0, done.stderr[-3000:]
    return rows(bench, "whole")


def test_resumed_run_equals_uninterrupted_run(bench, whole_run):
    """After a stop at step 2, steps 3 and 4 repeat bit for bit: data, noise, weights,
    moments and learning rate.
    """
    name = cut(bench, "whole")
    notes = bench / "runs" / name / "csv" / "notes.csv"
    notes.write_text("mine")
    done = run(bench, f"run.name={name}", "--resume", "train.monitors=[csv]")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after step 2" in done.stdout
    assert notes.read_text() == "mine", "once deleted, as a file of ours that was cut short"
    loss = (bench / "runs" / name / "csv" / "loss.csv").read_text().splitlines()
    assert loss == ["step,loss", *(f"{row['step']},{row['loss']}" for row in whole_run)], (
        "each step once, under one header"
    )
    assert [numbers(row) for row in rows(bench, name)] == [numbers(row) for row in whole_run]


def test_a_run_resumes_at_a_lower_learning_rate(bench, whole_run):
    """A run that stopped at a spike prints this advice.

    Resuming prints every setting that changed.
    """
    name = cut(bench, "whole", "slower")
    done = run(
        bench,
        f"run.name={name}",
        "optim.lr=1e-5",
        "optim.tensorar_lr=2e-5",
        "train.monitors=[csv]",
        "--resume",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "note: from here optim.lr: " in done.stdout and "-> 1e-05" in done.stdout
    for before, after in zip(rows(bench, "whole")[2:], rows(bench, name)[2:], strict=True):
        assert after["lr"] < before["lr"] and after["tensorar_lr"] == pytest.approx(2 * after["lr"])
    headers = {
        path.stem: path.read_text().splitlines()[0] for path in (bench / "runs" / name / "csv").glob("*.csv")
    }
    assert headers["seconds_step"] == "step,seconds_step" and headers["loss"] == "step,loss"


def test_a_run_does_not_resume_on_other_shards(bench, whole_run):
    """The folder can have the same path but other content."""
    name = cut(bench, "whole", "other_shards")
    state = bench / "runs" / name / "checkpoints" / "step_000002" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"shards": "0123"}))
    done = run(bench, f"run.name={name}", "--resume")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"(data.shards: {bench / 'shards'}) changed since step 2" in done.stderr


def test_a_run_does_not_resume_on_other_starting_weights(bench, whole_run):
    """Once a fine-tune resumed although the weights it had started from had been
    replaced.
    """
    name = cut(bench, "whole", "other_start")
    janus = bench / "janus_retrained"
    shutil.copytree(bench / "janus", janus)
    recipe = bench / "runs" / name / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(bench / "janus") + "\n", str(janus) + "\n", 1))
    weights = janus / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = run(bench, f"run.name={name}", f"backbone.path={janus}", "--resume")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"(backbone.path: {janus}) changed since step 2" in done.stderr


def test_a_damaged_run_state_is_reported_in_one_sentence(bench, whole_run):
    """For example one flipped bit of a weight, which would still load."""
    name = cut(bench, "whole", "damaged")
    folder = bench / "runs" / name / "checkpoints" / "step_000002"
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = run(bench, f"run.name={name}", "--resume")
    assert (
        done.returncode == 2 and f"is damaged ({path.name} is not the file that was written)" in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_run_killed_before_it_wrote_its_model_folder_writes_it_on_resume(bench, whole_run):
    """The last checkpoint exists but model/ does not: resuming writes it without
    another step.
    """
    copy = bench / "runs" / "unwritten"
    shutil.copytree(bench / "runs" / "whole", copy)
    shutil.rmtree(copy / "model")
    (copy / "recipe.yaml").write_text(
        (copy / "recipe.yaml").read_text().replace("name: whole", "name: unwritten")
    )
    done = run(bench, "run.name=unwritten", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    written, whole = (
        load_file(bench / "runs" / name / "model" / model_folder.CODEC) for name in ("unwritten", "whole")
    )
    assert all(torch.equal(written[name], value) for name, value in whole.items())
    assert rows(bench, "unwritten") == whole_run


def test_run_folder_is_complete(bench, whole_run):
    folder = bench / "runs" / "whole"
    assert [row["step"] for row in whole_run] == [1, 2, 3, 4]
    assert len(whole_run[0]["loss_per_offset"]) == 3
    for row in whole_run:
        assert (
            row["seconds"].keys() - {"save"} == {"data", "forward", "backward", "step"}
            and min(row["seconds"].values()) > 0
        )
        assert 0 < row["data_share"] < 1 and 0 < row["mfu"] < 1
    assert "save" in whole_run[2]["seconds"], "of the checkpoint after step 2"
    assert model_folder.check_files(folder / "model")["step"] == 4
    assert (folder / "recipe.yaml").is_file() and any((folder / "tensorboard").iterdir())


def test_bfloat16_on_two_ranks_saves_its_master_copy_and_resumes_exactly(bench):
    """Two steps of few samples: on a CPU without bfloat16 instructions a step takes
    seconds.
    """
    settings = ["train.precision=bf16", "zero.stage=3", "train.steps=2", "train.save_every=1"]
    settings += ["data.batch_size=2", "train.grad_accum=1"]
    done = run(bench, "run.name=bf16", *settings, ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    weights = load_file(bench / "runs" / "bf16" / "model" / model_folder.CODEC).values()
    assert not any(torch.equal(w, w.bfloat16().float()) for w in weights), "not the rounded copy"
    name = cut(bench, "bf16", step=1)
    done = run(bench, f"run.name={name}", *settings, "--resume", ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert [numbers(row) for row in rows(bench, name)] == [numbers(row) for row in rows(bench, "bf16")]


def test_finished_run_is_not_overwritten(bench, whole_run):
    done = run(bench, "run.name=whole")
    assert done.returncode == 2
    assert "holds a finished run" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def two_ranks(bench):
    # With lookahead the number of passes depends on rounding, so no rank may wait for
    # another one while it samples.
    sampling = ["train.sample_every=1", "train.sample_prompts=[a red circle]", "sampler.lookahead=4"]
    saving = ["train.save_every=1", "train.keep_last=4", "train.save_in_background=true"]
    done = run(bench, "run.name=two", "zero.stage=3", *ALIKE, *sampling, *saving, EMA, ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return rows(bench, "two")


def test_zero_3_on_two_ranks_equals_one_rank(bench, two_ranks):
    """Every step has the same samples, dropped prompts and noise, also with another
    micro-batch size.

    Without ZeRO, DeepSpeed began with a step of zero gradients, so the first updates
    were a third too small. A step changes the loss by about 0.1 %, and a tolerance of
    1 % hid that.
    """
    one = run(bench, "run.name=one", *ALIKE, "train.grad_accum=2", "train.save_every=0", EMA)
    assert one.returncode == 0, one.stderr[-3000:]
    assert_close(rows(bench, "one"), two_ranks)
    assert (bench / "runs" / "two" / "samples" / "step_4.png").is_file()
    assert len(two_ranks[3]["revised_per_offset"]) == 2 and all(
        0 <= share <= 1 for share in two_ranks[3]["revised_per_offset"]
    )
    assert model_folder.check_files(bench / "runs" / "two" / "model")["step"] == 4
    # The average kept in partitions equals the average of the whole, and differs from
    # the model.
    alone, pieces = (
        model_folder.load(bench / "runs" / name / "model_ema").model.state_dict() for name in ("one", "two")
    )
    model = model_folder.load(bench / "runs" / "one" / "model").model.state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-2, atol=1e-4)
    assert max((model[name] - value).abs().max() for name, value in alone.items()) > 1e-3


@pytest.mark.parametrize("stage", [1, 2])
def test_the_other_zero_stages_compute_the_same(bench, two_ranks, stage):
    name = f"stage_{stage}"
    done = run(bench, f"run.name={name}", f"zero.stage={stage}", *ALIKE, ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert_close(rows(bench, name), two_ranks)


def exported_alike(bench: Path, name: str) -> None:
    """Models exported from a checkpoint equal those that the run wrote, whichever rank
    and stage wrote it.
    """
    from mmtensorar.export import main

    folder = bench / "runs" / name
    for average, written in (([], "model"), (["--average"], "model_ema")):
        assert main([str(folder), *average, "--out", str(folder / "exported")]) == 0
        one, other = (model_folder.load(folder / each).model.state_dict() for each in ("exported", written))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert main([str(bench / "runs" / "two"), "--step", "1", "--out", str(folder / "exported")]) == 0
    assert model_folder.read_index(folder / "exported")["step"] == 1


def test_a_run_resumes_on_other_numbers_of_ranks_and_other_stages(bench, two_ranks):
    """The run uses two ranks under ZeRO-3, one under ZeRO-2, two without ZeRO, and one
    under ZeRO-1.

    Its losses and models equal those of a run that never changed, up to rounding.
    """
    name = "two"
    ways = [(1, ["zero.stage=2", "train.grad_accum=2"]), (2, ["zero.stage=0"]), (1, ["zero.stage=1"])]
    for step, (ranks, settings) in enumerate(ways, 1):
        name = cut(bench, name, "on", step=step)
        done = run(
            bench,
            f"run.name={name}",
            *ALIKE,
            *settings,
            EMA,
            "train.save_every=1",
            "train.keep_last=4",
            "--resume",
            ranks=ranks,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert f"after step {step}" in done.stdout
        assert_close(rows(bench, name), two_ranks)
    exported_alike(bench, name)
    for folder in ("model", "model_ema"):
        one, other = (
            model_folder.load(bench / "runs" / each / folder).model.state_dict() for each in ("two", name)
        )
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-2, atol=2e-4)


def test_resumed_zero_3_on_two_ranks_equals_uninterrupted_run(bench, two_ranks):
    """Every rank restores its own share of the weights and moments, and its own
    position in the data. It does not sample, which changes nothing.
    """
    name = cut(bench, "two")
    done = run(bench, f"run.name={name}", "zero.stage=3", *ALIKE, EMA, "--resume", ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    one, other = (
        model_folder.load(bench / "runs" / each / "model_ema").model.state_dict() for each in ("two", name)
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "after step 2" in done.stdout
    assert [numbers(row) for row in rows(bench, name)] == [numbers(row) for row in two_ranks]


def test_a_run_with_eight_bit_moments_resumes_exactly(bench):
    settings = ["optim.name=adamw_8bit", "zero.stage=2"]
    assert run(bench, "run.name=eight", *settings).returncode == 0
    name = cut(bench, "eight")
    done = run(bench, f"run.name={name}", *settings, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [numbers(row) for row in rows(bench, name)] == [numbers(row) for row in rows(bench, "eight")]


def test_adapters_under_zero_3_resume_exactly_and_load(bench):
    settings = ["train.parts=lora", "lora.rank=4", "zero.stage=3"]
    done = run(bench, "run.name=lora", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adapters" in done.stdout and "trained" in done.stdout
    name = cut(bench, "lora")
    done = run(bench, f"run.name={name}", *settings, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [numbers(row) for row in rows(bench, name)] == [numbers(row) for row in rows(bench, "lora")]
    one, other = (
        model_folder.load(bench / "runs" / run_name / "model").model.state_dict()
        for run_name in ("lora", name)
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {path.name for path in (bench / "runs" / "lora" / "model").glob("*.safetensors")} == {
        "adapters.safetensors",
        "tensorar.safetensors",
    }


def test_damage_on_one_rank_stops_both(bench):
    """Only rank 1 reads the damaged sample.

    Rank 0 must learn of it, and is the rank that prints the error.
    """
    folder = bench / "damaged"
    shutil.copytree(bench / "shards", folder)
    manifest = Manifest.read(folder)
    # The first sample of rank 1.
    order = Order([shard.num_samples for shard in manifest.shards], rows=4, seed=0, shuffle=0)
    place = location(order, 1)
    shard, damaged = manifest.shards[place.shard], place.sample
    samples = list(iterate_tar(folder / shard.name))
    samples[damaged].members["codes.npy"] = encode_codes(np.full((1, SIDE * SIDE, 1), NUM_CODES, np.uint16))
    write_tar(folder / shard.name, samples)
    done = run(bench, "run.name=damaged", f"data.shards={folder}", ranks=2)
    assert done.returncode == 2
    where = f"{folder / shard.name}: sample {samples[damaged].key}"
    assert f"error: {where}: codes.npy holds code 32, but factor 0 has 32 codes\n" in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]


@pytest.fixture(scope="module")
def holed(bench) -> Path:
    """A set of 12 samples, of which one has no caption."""
    folder = bench / "holed"
    shutil.copytree(bench / "shards", folder)
    manifest = Manifest.read(folder)
    (one, two), path = list(iterate_tar(folder / "00001.tar")), folder / "00001.tar"
    others = [one._replace(key=f"{number:02d}") for number in range(20, 28)]
    others[3] = Sample("23", {name: value for name, value in one.members.items() if name != "txt"})
    shard = write_tar(path, [one, two, *others])
    manifest.model_copy(update={"shards": (manifest.shards[0], shard), "num_samples": 12}).write(folder)
    return folder


def test_a_skipped_sample_is_logged_with_its_shard_and_key_and_counted(bench, holed):
    """Also across a resumption.

    Past data.max_skipped the run stops, and all steps before are saved.
    """
    settings = [f"data.shards={holed}", "data.on_error=skip", "train.save_every=1", "train.keep_last=9"]
    done = run(bench, "run.name=skips", *settings, "data.max_skipped=0.2", "train.steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(bench, "skips")
    first = next(row["step"] for row in found if row["num_skipped"])
    assert [row["num_skipped"] for row in found] == [int(row["step"] >= first) for row in found]
    (skipped,) = run_log.read_log(bench / "runs" / "skips" / "skipped.jsonl")
    assert skipped == {"step": first, "problem": f"{holed / '00001.tar'}: sample 23: no txt member"}
    assert f"skipped at step {first}: {holed / '00001.tar'}: sample 23: no txt member\n" in done.stdout
    done = run(
        bench, "run.name=skips", *settings, "data.max_skipped=0.05", "train.steps=9", "--resume", ranks=1
    )
    assert done.returncode == 2
    stopped = re.search(
        "error: 2 damaged samples skipped by step ([456]), more than data.max_skipped 0.05", done.stderr
    )
    assert stopped and "Traceback" not in done.stderr, done.stderr[-2000:]  # in the second epoch
    assert f"of an epoch of 12; the last run state is of step {int(stopped[1]) - 1}" in done.stderr


def test_the_validation_loss_does_not_depend_on_the_ranks(bench, holed):
    """Five samples in batches of two: on two ranks, one of the four batches only keeps
    the ranks in step.
    """
    folder = bench / "validation"
    shutil.copytree(bench / "shards", folder)
    manifest = Manifest.read(folder)
    (one, two), path = list(iterate_tar(folder / "00001.tar")), folder / "00001.tar"
    shard = write_tar(path, [one, two, two._replace(key="12")])
    manifest.model_copy(update={"shards": (manifest.shards[0], shard), "num_samples": 5}).write(folder)
    settings = [
        f"data.validation={folder}",
        "data.validation_batch_size=2",
        "train.validate_every=2",
    ]
    losses = []
    for ranks in (1, 2):
        done = run(
            bench,
            f"run.name=validated{ranks}",
            *settings,
            "train.steps=null",
            "train.epochs=3.9",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = rows(bench, f"validated{ranks}")
        # 3.9 epochs of 4 samples, with 4 samples per step.
        assert [row["step"] for row in found if "validation_loss" in row] == [2, 3]
        losses.append([[row["validation_loss"], *row["validation_loss_per_offset"]] for row in found[1:]])
        assert all(0 <= share <= 1 for share in found[1]["validation_accuracy_per_offset"])
        assert "validation loss" in done.stdout
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][0] != losses[0][1]


def test_the_best_run_state_by_validation_loss_is_kept(bench, holed):
    """Of four checkpoints only the last and the best stay.

    At this learning rate the loss goes up and down.
    """
    settings = [
        f"data.validation={bench / 'shards'}",
        "train.validate_every=1",
        "train.save_every=1",
        "train.keep_last=1",
    ]
    done = run(bench, "run.name=best", "optim.lr=1", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {row["step"]: row["validation_loss"] for row in rows(bench, "best")}
    best, folder = min(losses, key=losses.get), bench / "runs" / "best" / "checkpoints"
    assert (folder / "best").read_text() == f"step_{best:06d}"
    assert sorted(path.name for path in folder.glob("step_*")) == sorted({f"step_{best:06d}", "step_000004"})


def test_plain_trains_the_control(bench, monkeypatch):
    """--plain trains the same recipe without TensorAR, in its own run folder."""
    from mmtensorar import train as module

    seen = []
    monkeypatch.setattr(module, "train", lambda recipe, **options: seen.append(recipe) or 0)
    monkeypatch.setattr(module, "stop_process_group", lambda: None)
    weights = "tensorar.offset_weights=[1, 0.5, 0.2]"
    for switch in ([], ["--plain"]):
        assert module.main([str(bench / "recipe.yaml"), weights, "run.name=mine", *switch]) == 0
    ours, plain = (recipe.model_dump() for recipe in seen)
    assert plain["run"].pop("name") == "mine_plain" and ours["run"].pop("name") == "mine"
    assert plain.pop("tensorar")["window"] == 1 and ours.pop("tensorar")["window"] == 3
    assert ours == plain


def test_two_sets_train_together(bench, holed):
    sets = yaml.safe_dump(
        {str(bench / "shards"): 3.0, str(holed): 1.0}, default_flow_style=True, width=10_000
    )
    done = run(
        bench, "run.name=mixed", f"data.shards={sets}", "data.on_error=skip", "data.max_skipped=1", ranks=2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(rows(bench, "mixed")) == 4 and (bench / "runs" / "mixed" / "model").is_dir()


def test_non_finite_loss_on_one_rank_stops_both(bench):
    """The embedding of one caption's word is NaN.

    All ranks learn of the loss before the update, and nothing is saved.
    """
    folder = bench / "nan"
    shutil.copytree(bench / "janus", folder)
    weights = load_file(folder / "model.safetensors")
    text_tokenizer = backbones.load(Recipe.load(bench / "recipe.yaml", []).backbone).text_tokenizer
    weights["model.language_model.embed_tokens.weight"][text_tokenizer.convert_tokens_to_ids("green")] = (
        float("nan")
    )
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = run(bench, "run.name=nan", f"backbone.path={folder}", "data.uncond_rate=0", ranks=2)
    assert done.returncode == 2
    assert "error: the loss is not finite at step 1:" in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert not rows(bench, "nan") and not (bench / "runs" / "nan" / "checkpoints").exists()
    assert not (bench / "runs" / "nan" / "model").exists()
    told = json.loads((bench / "runs" / "nan" / "stopped.json").read_text())
    assert (
        told["step"] == 1
        and told["reason"].startswith("the loss is not finite")
        and len(set(told["samples"])) == 4
    )


def test_a_spike_of_the_gradient_stops_and_names_the_samples(bench):
    done = run(bench, "run.name=spike", "train.max_grad_norm=1e-3", "train.save_every=0")
    assert (
        done.returncode == 2
        and "more than train.max_grad_norm 0.001; no run state was saved yet" in done.stderr
    )
    told = json.loads((bench / "runs" / "spike" / "stopped.json").read_text())
    assert len(told["samples"]) == 4 and all(
        "00000.tar" in name or "00001.tar" in name for name in told["samples"]
    )


@pytest.mark.parametrize("code", [0, 2])
def test_a_process_of_a_group_exits_with_its_own_code(code):
    """While threads of the process group run, the normal end of the interpreter may
    abort, which gives another exit code.
    """
    lines = """
from mmtensorar import processes
from mmtensorar.training import distributed
distributed.start_process_group(0)
print('said', end='')
processes.exit_process({})
"""
    done = finish_ranks(fork_ranks("-c", lines.format(code)), timeout_s=120)
    assert (done.returncode, done.stdout.endswith("said")) == (code, True), done.stderr[-2000:]


def test_backbone_and_image_tokenizer_of_different_models_are_refused(bench):
    """The shards fit the image tokenizer, so the mistake can only be seen once the
    model is built.
    """
    write_tiny_janus(bench / "other", num_codes=NUM_CODES + 1, side=SIDE)
    done = run(bench, "run.name=other", f"backbone.path={bench / 'other'}")
    assert done.returncode == 2
    assert "is not the image tokenizer of" in done.stderr and "Traceback" not in done.stderr
    assert (
        "the backbone predicts 16 codes an image out of 33" in done.stderr
        and "makes 16 codes an image out of 32," in done.stderr
    )


@pytest.fixture(scope="module")
def terminated(bench):
    """A float32 run without ZeRO, stopped by SIGTERM."""
    recipe = bench / "recipe.yaml"
    started = fork_ranks(TRAIN, recipe, *endless("terminated"), "optim.grad_clip=0.01", cwd=bench)
    signal_after_a_step(signal.SIGTERM, started[0], bench, "terminated")
    return finish_ranks(started, timeout_s=120)


def stopped_well(bench: Path, name: str, done: subprocess.CompletedProcess) -> None:
    assert "stopped by a signal" in done.stdout, (done.stdout + done.stderr)[-3000:]
    last = rows(bench, name)[-1]["step"]
    assert (bench / "runs" / name / "checkpoints" / "latest").read_text() == f"step_{last:06d}"
    assert not (bench / "runs" / name / "model").exists()


def test_signal_saves_and_stops(bench, terminated):
    """SIGTERM ends the step, saves the run state and prints how to resume."""
    assert terminated.returncode == 128 + signal.SIGTERM, terminated.stderr[-3000:]
    stopped_well(bench, "terminated", terminated)


def test_float32_logs_the_norm_of_the_gradient(bench, terminated):
    """Without ZeRO and in float32 DeepSpeed keeps no norm.

    We log the norm of the gradient of the whole step's mean loss, before clipping.
    """
    from mmtensorar.seeds import seed_for

    recipe = Recipe.load(bench / "recipe.yaml", [])
    model = model_folder.initial_model(recipe).train()
    batches = loader.stream(recipe, backbones.caption_encoder(recipe.backbone), rank=0, world_size=1)
    for micro in range(recipe.train.grad_accum):
        generator = torch.Generator().manual_seed(seed_for(recipe.run.seed, 1))
        (model(*next(batches)[:3], generator, (2 * micro, 4)).loss / recipe.train.grad_accum).backward()
    squares = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert rows(bench, "terminated")[0]["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)


def test_ctrl_c_through_the_launcher_saves_and_stops(bench):
    """Launcher, ranks and loader workers all receive SIGINT.

    The launcher forwards it as SIGTERM, and all processes end.
    """
    process = launch(bench, *endless("interrupted"), "data.num_workers=1", ranks=2)
    signal_after_a_step(signal.SIGINT, process, bench, "interrupted")
    done = finish(process, timeout_s=120)
    stopped_well(bench, "interrupted", done)
    # The launcher prints its own traceback.
    assert f'File "{TRAIN}"' not in done.stderr, done.stderr[-3000:]
