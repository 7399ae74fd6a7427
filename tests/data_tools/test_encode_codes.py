"""Encoding pictures: over several ranks, in crops, in bf16."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_tools import check_shards, encode_codes, make_shards, pipeline
from mmtensorar import image_tokenizers
from mmtensorar.data.members import decode_codes
from mmtensorar.data.pictures import decode_picture
from mmtensorar.data.shards import Manifest, Sample, Staging, iterate_tar, write_tar
from mmtensorar.image_tokenizers import llamagen_vq
from tests.helpers.fakes import write_tiny_janus

ROOT = Path(__file__).resolve().parents[2]
SIDE, NUM_CODES = 4, 32


@pytest.fixture(scope="module")
def vq(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("janus")
    write_tiny_janus(folder, NUM_CODES, SIDE)
    return folder / "vq"


@pytest.fixture(scope="module")
def plain(tmp_path_factory, vq) -> Path:
    """Ten pictures of the image tokenizer's size in five shards, without codes."""
    folder = tmp_path_factory.mktemp("plain") / "set"
    return make(folder, size(vq), 10)


def size(vq: Path) -> int:
    return image_tokenizers.load(image_tokenizers.section({"name": "janus_vq", "path": str(vq)})).image_size


def make(folder: Path, image_size: int, num_samples: int) -> Path:
    arguments = [
        "--synthesize",
        "shapes",
        "--num-samples",
        str(num_samples),
        "--samples-per-shard",
        "2",
        "--workers",
        "1",
    ]
    assert make_shards.main([*arguments, "--image-size", str(image_size), "--out", str(folder)]) == 0
    return folder


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def encode(folder: Path, vq: Path, *arguments: object) -> int:
    return encode_codes.main(
        [str(folder), "--image-tokenizer", str(vq), "--device", "cpu", *map(str, arguments)]
    )


def on_two_ranks(folder: Path, vq: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["data_tools/encode_codes.py", str(folder), "--image-tokenizer", str(vq)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


@pytest.mark.launch
def test_two_ranks_resume_where_one_stopped_and_end_with_the_same_bytes(tmp_path, plain, vq, monkeypatch):
    alone, together = copy(plain, tmp_path / "alone"), copy(plain, tmp_path / "together")
    assert encode(alone, vq) == 0
    real, calls = Staging.record, []

    def interrupted(staging, shard):
        real(staging, shard)
        calls.append(shard.name)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "record", interrupted)
    assert encode(together, vq) == 130
    times = {path.name: path.stat().st_mtime_ns for path in together.glob(".unfinished-*/*.tar")}
    assert len(times) == 2 and Manifest.read(together).codes is None
    done = on_two_ranks(together, vq)
    assert done.returncode == 0, done.stderr[-3000:]
    assert content(together) == content(alone) and check_shards.main([str(together), "--workers", "1"]) == 0
    assert all((together / name).stat().st_mtime_ns == time for name, time in times.items()), (
        "a finished shard was made again"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_codes_written_in_one_pass_are_those_added_afterwards(tmp_path, plain, vq, monkeypatch, workers):
    """The same holds when the pass is interrupted while it encodes."""
    expected = copy(plain, tmp_path / "expected")
    assert encode(expected, vq) == 0
    arguments = [
        "--synthesize",
        "shapes",
        "--num-samples",
        "10",
        "--samples-per-shard",
        "2",
        "--workers",
        str(workers),
    ]
    arguments += [
        "--image-size",
        str(size(vq)),
        "--image-tokenizer",
        str(vq),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "set"),
    ]
    real, calls = pipeline.add_codes, []

    def interrupted(*rest):
        calls.append(rest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*rest)

    monkeypatch.setattr(pipeline, "add_codes", interrupted)
    assert make_shards.main(arguments) == 130
    assert make_shards.main(arguments) == 0 and len(calls) == 6
    tars, others = (
        {n: c for n, c in content(folder).items() if n != "manifest.json"}
        for folder in (tmp_path / "set", expected)
    )
    assert tars == others and Manifest.read(tmp_path / "set").codes == Manifest.read(expected).codes
    assert make_shards.main(arguments) == 0 and len(calls) == 6  # the set exists, so nothing is encoded


def test_codes_and_text_features_in_one_pass(tmp_path, plain, vq):
    """One command writes the same bytes as three commands."""
    from data_tools import encode_text
    from tests.helpers.fakes import write_tiny_t5

    write_tiny_t5(tmp_path / "t5")
    text = [
        "--text-encoder",
        str(tmp_path / "t5"),
        "--caption-cleaning",
        "none",
        "--max-tokens",
        "7",
        "--device",
        "cpu",
    ]
    expected = copy(plain, tmp_path / "expected")
    assert encode(expected, vq) == 0 and encode_text.main([str(expected), *text]) == 0
    arguments = [
        "--synthesize",
        "shapes",
        "--num-samples",
        "10",
        "--samples-per-shard",
        "2",
        "--workers",
        "1",
    ]
    arguments += [
        "--image-size",
        str(size(vq)),
        "--image-tokenizer",
        str(vq),
        *text,
        "--out",
        str(tmp_path / "set"),
    ]
    assert make_shards.main(arguments) == 0
    made, wanted = Manifest.read(tmp_path / "set"), Manifest.read(expected)
    assert (made.codes, made.text_features) == (
        wanted.codes,
        wanted.text_features,
    ) and made.text_features.max_tokens == 7
    assert [shard.sha256 for shard in made.shards] == [shard.sha256 for shard in wanted.shards]


def test_a_size_that_does_not_fit_is_reported_before_anything_is_written(tmp_path, vq, capsys):
    arguments = ["--synthesize", "shapes", "--num-samples", "4", "--image-size", str(size(vq) + 1)]
    assert make_shards.main([*arguments, "--image-tokenizer", str(vq), "--out", str(tmp_path / "set")]) == 2
    assert (
        f"pixels, the image tokenizer takes {size(vq)}" in capsys.readouterr().err
        and not (tmp_path / "set").exists()
    )


@pytest.mark.launch
def test_damage_on_one_rank_ends_both_with_one_sentence(tmp_path, plain, vq):
    folder = copy(plain, tmp_path / "set")
    path = folder / "00001.tar"
    first, second = iterate_tar(path)
    write_tar(path, [first, Sample(second.key, second.members | {"jpg": b"no picture"})])
    done = on_two_ranks(folder, vq)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr[-3000:]
    assert f"error: {path}: sample {second.key}: unreadable image (not a JPEG, PNG or WEBP)\n" in done.stderr
    assert Manifest.read(folder).codes is None


@pytest.mark.parametrize("crops", [2, 5])
def test_the_codes_of_a_crop_do_not_depend_on_its_batch(tmp_path, vq, crops):
    side = size(vq)
    folder = make(tmp_path / "set", side if crops == 2 else side + 6, 4)
    assert encode(folder, vq, "--crops", crops) == 0
    assert Manifest.read(folder).codes.crops == crops
    image_tokenizer = image_tokenizers.load(image_tokenizers.section({"name": "janus_vq", "path": str(vq)}))
    for shard in Manifest.read(folder).shards:
        for sample in iterate_tar(folder / shard.name):
            pixels = image_tokenizers.to_pixels([decode_picture(sample.members["jpg"], "")])
            if crops == 2:
                expected = [pixels, pixels.flip(-1)]
            else:
                corners = [
                    pixels[..., y : y + side, x : x + side] for y, x in ((0, 0), (0, 6), (6, 0), (6, 6))
                ]
                expected = [*corners, pixels[..., 3 : 3 + side, 3 : 3 + side]]
            codes = torch.cat([image_tokenizer.encode(each) for each in expected]).numpy()
            assert np.array_equal(decode_codes(sample.members["codes.npy"], ""), codes)


def test_bf16_is_recorded_and_looks_codes_up_in_full_precision(tmp_path, plain, vq, capsys):
    folder = copy(plain, tmp_path / "set")
    assert encode(folder, vq) == 0
    before = content(folder)
    assert encode(folder, vq, "--precision", "bf16") == 0
    assert Manifest.read(folder).codes.precision == "bf16"
    assert "reusing" not in capsys.readouterr().out and encode(folder, vq, "--precision", "bf16") == 0
    assert "reusing" in capsys.readouterr().out
    assert encode(folder, vq) == 0 and content(folder) == before


def test_llamagen_looks_codes_up_in_full_precision_under_autocast():
    """1,000 rows so close to each other that bf16 cannot distinguish them; the nearest
    code of every row is the row itself.
    """
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(1 + 1e-2 * torch.randn(1000, 8), dim=-1)
    codebook = llamagen_vq.Codebook(
        SimpleNamespace(l2_norm=True, codebook_size=1000, code_dim=8)
    ).requires_grad_(False)
    codebook.embedding.weight.copy_(rows)
    with torch.autocast("cpu", torch.bfloat16):
        found, naive = codebook.nearest(rows.T[None, :, :, None])[0], (rows @ rows.T).argmax(-1)
    assert (found == torch.arange(1000)).float().mean() > 0.99 > (naive == torch.arange(1000)).float().mean()


def test_janus_looks_codes_up_in_full_precision_under_autocast(vq):
    image_tokenizer = image_tokenizers.load(image_tokenizers.section({"name": "janus_vq", "path": str(vq)}))
    model = image_tokenizer.model
    pixels = (
        torch.rand(64, 3, *[image_tokenizer.image_size] * 2, generator=torch.Generator().manual_seed(0)) * 2
        - 1
    )
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        codes = image_tokenizer.encode(pixels)[..., 0]
        features = model.quant_conv(model.encoder(pixels)).float().permute(0, 2, 3, 1).flatten(1, 2)
    rows = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=-1)
    assert torch.equal(codes, (torch.nn.functional.normalize(features, dim=-1) @ rows.T).argmax(-1))
