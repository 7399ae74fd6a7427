"""The commands from pictures to codes: reproducible, resumable, and one sentence for
every user error.
"""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import check_shards, encode_codes, make_shards, pipeline, storage
from mmtensorar import image_tokenizers
from mmtensorar.checkpoints import recognise
from mmtensorar.data import members
from mmtensorar.data.members import decode_codes
from mmtensorar.data.pictures import decode_picture
from mmtensorar.data.shards import Manifest, Sample, iterate_tar, write_tar

ROOT = Path(__file__).resolve().parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def all_samples(folder: Path) -> list[Sample]:
    return [sample for shard in Manifest.read(folder).shards for sample in iterate_tar(folder / shard.name)]


def make(out: Path, *arguments: object) -> int:
    return make_shards.main([*map(str, arguments), "--out", str(out), "--workers", "1"])


def shapes(out: Path, *arguments: object, num_samples: int = 5) -> int:
    return make(
        out,
        "--synthesize",
        "shapes",
        "--num-samples",
        num_samples,
        "--samples-per-shard",
        2,
        "--image-size",
        16,
        *arguments,
    )


def fails(capsys, code: int) -> str:
    """The sentence on stderr of a command that ended with exit code 2."""
    sentence = capsys.readouterr().err
    assert code == 2 and sentence.startswith("error: ") and sentence.count("\n") == 1, sentence
    return sentence


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of three captioned pictures in two sizes, one of them in a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size, color in (
        ("b.png", (30, 20), "red"),
        ("a.jpg", (20, 30), "blue"),
        ("more/c.webp", (20, 20), "white"),
    ):
        Image.new("RGB", size, color).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a {color} picture\n")
    return folder


# ---- make_shards -----------------------------------------------------------------------------


@pytest.mark.launch
def test_the_same_seed_gives_the_same_bytes_with_one_and_two_workers(tmp_path):
    """The command runs as a user runs it, from another folder."""
    for workers in ("1", "2"):
        command = [
            sys.executable,
            ROOT / "data_tools/make_shards.py",
            "--synthesize",
            "shapes",
            "--num-samples",
            "5",
        ]
        command += [
            "--samples-per-shard",
            "2",
            "--out",
            tmp_path / workers,
            "--workers",
            workers,
            "--seed",
            "7",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert list(content(tmp_path / "1")) == ["00000.tar", "00001.tar", "00002.tar", "manifest.json"]


@pytest.mark.launch
def test_the_tool_starts_without_torch():
    """Worker processes import the tool again where processes are spawned; importing
    torch alone would cost seconds per process.
    """
    command = (
        "import sys; sys.path[0] = '.'; import data_tools.make_shards; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, timeout=60).returncode == 0


def test_captions_of_shapes_describe_the_drawing(tmp_path):
    assert shapes(tmp_path / "set") == 0
    samples = all_samples(tmp_path / "set")
    assert [sample.key for sample in samples] == [f"{i:09d}" for i in range(5)]
    for sample in samples:
        meta = json.loads(sample.members["json"])
        assert meta["source"] == "shapes" and meta["size"] == [16, 16]
        assert json.loads(meta["scene"])["prompt"] == sample.members["txt"].decode()
    assert shapes(tmp_path / "other", "--seed", 1) == 0
    assert content(tmp_path / "set")["00000.tar"] != content(tmp_path / "other")["00000.tar"]


def test_a_larger_synthesised_set_begins_with_the_smaller(tmp_path):
    assert shapes(tmp_path / "small", num_samples=4) == shapes(tmp_path / "large", num_samples=6) == 0
    assert all_samples(tmp_path / "large")[:4] == all_samples(tmp_path / "small")


def test_a_folder_keeps_picture_and_caption_together(tmp_path, pictures):
    assert make(tmp_path / "set", "--folder", pictures, "--image-size", 16) == 0
    samples = all_samples(tmp_path / "set")
    found = {}
    for sample in samples:
        image = decode_picture(sample.members["jpg"], "")
        assert image.size == (16, 16)
        found[sample.members["txt"].decode()] = image.getpixel((8, 8))
        meta = json.loads(sample.members["json"])
        assert meta["source"] == "folder" and (pictures / meta["name"]).stat().st_size == meta["num_bytes"]
    assert sorted(found) == ["a blue picture", "a red picture", "a white picture"]
    for name, color in (("red", (254, 0, 0)), ("blue", (0, 0, 254)), ("white", (255, 255, 255))):
        assert np.abs(np.subtract(found[f"a {name} picture"], color)).max() <= 3


def test_the_shorter_side_is_resized_and_the_centre_is_kept(tmp_path, pictures):
    for path in [*pictures.glob("a.*"), *pictures.glob("more/*")]:
        path.unlink()
    image = Image.new("RGB", (96, 32), "red")
    image.paste("lime", (32, 0, 64, 32))
    image.save(pictures / "b.png")
    assert make(tmp_path / "set", "--folder", pictures, "--image-size", 16) == 0
    middle = np.asarray(decode_picture(all_samples(tmp_path / "set")[0].members["jpg"], ""))[:, 2:-2]
    assert (middle[..., 1] > 240).all() and (middle[..., 0] < 15).all()


def test_jsonl_reads_the_same_pictures_and_keeps_other_fields(tmp_path, pictures):
    lines = [{"image": name, "caption": name, "licence": "none"} for name in ("a.jpg", "more/c.webp")]
    (pictures / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert make(tmp_path / "set", "--jsonl", pictures / "list.jsonl", "--image-size", 16) == 0
    metas = [json.loads(sample.members["json"]) for sample in all_samples(tmp_path / "set")]
    assert sorted(meta["name"] for meta in metas) == ["a.jpg", "more/c.webp"]
    assert all(json.loads(meta["fields"]) == {"licence": "none"} for meta in metas)


def test_the_order_of_a_folder_is_shuffled_by_the_seed(tmp_path, pictures):
    for i in range(20):
        (pictures / f"{i:02d}.jpg").write_bytes((pictures / "a.jpg").read_bytes())
        (pictures / f"{i:02d}.txt").write_text(str(i))
    orders = []
    for seed in (0, 1):
        assert make(tmp_path / str(seed), "--folder", pictures, "--image-size", 8, "--seed", seed) == 0
        orders.append([sample.members["txt"] for sample in all_samples(tmp_path / str(seed))])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_finished_set_is_reused_and_another_is_refused(tmp_path, capsys):
    out = tmp_path / "set"
    assert shapes(out) == 0
    before = content(out)
    capsys.readouterr()
    assert shapes(out) == 0
    assert "reusing" in capsys.readouterr().out
    for other in (("--seed", 1), ("--image-size", 24), ("--samples-per-shard", 3)):
        assert "holds another set" in fails(capsys, shapes(out, *other)) and content(out) == before
    assert shapes(out, "--overwrite", num_samples=3) == 0
    assert Manifest.read(out).num_samples == 3 and list(content(out)) == [
        "00000.tar",
        "00001.tar",
        "manifest.json",
    ]


def test_a_set_of_a_changed_folder_is_not_reused(tmp_path, pictures, capsys):
    assert make(tmp_path / "set", "--folder", pictures) == 0
    (pictures / "a.txt").write_text("another caption")
    assert "holds another set" in fails(capsys, make(tmp_path / "set", "--folder", pictures))


def test_an_interrupted_run_resumes_and_ends_with_the_same_bytes(tmp_path, monkeypatch, capsys):
    assert shapes(tmp_path / "whole") == 0
    real, calls = pipeline.make_part, []

    def interrupted(*task):
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*task)

    monkeypatch.setattr(pipeline, "make_part", interrupted)
    assert shapes(tmp_path / "cut") == 130
    assert not (tmp_path / "cut" / "manifest.json").exists()
    assert shapes(tmp_path / "cut") == 0
    assert "1 of 3 parts are finished" in capsys.readouterr().out
    assert content(tmp_path / "cut") == content(tmp_path / "whole") and len(calls) == 4


def test_a_folder_with_other_things_is_left_alone(tmp_path, capsys):
    (tmp_path / "00000.tar").write_text("mine")
    assert "is not a shard folder" in fails(capsys, shapes(tmp_path, "--overwrite"))
    assert (tmp_path / "00000.tar").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("b.txt", None, "b.png: no caption; expected it in"),
        ("b.txt", b"\xff\xfe", "b.txt: the caption is not UTF-8"),
        ("b.txt", b"", "b.txt: the caption is empty"),
        ("b.png", b"no picture", "b.png: unreadable image (not a JPEG, PNG, WEBP, BMP, GIF or TIFF)"),
        ("more/c.webp", b"RIFF", "more/c.webp: unreadable image"),
    ],
)
def test_a_bad_file_is_named(tmp_path, pictures, capsys, name, damage, expected):
    (pictures / name).unlink()
    if damage is not None:
        (pictures / name).write_bytes(damage)
    assert expected in fails(capsys, make(tmp_path / "set", "--folder", pictures))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{", "list.jsonl:2: not JSON"),
        (b"[1]", "list.jsonl:2: holds list"),
        (b'{"image": "a.jpg"}', "list.jsonl:2: no caption in 'caption'; found 'image'"),
        (b'{"caption": "x"}', "list.jsonl:2: expected an image in 'image', found 'caption'"),
        (b'{"image": 1, "caption": "x"}', "list.jsonl:2: the image is int; expected a path"),
        (b'{"image": "a.jpg", "caption": 1}', "list.jsonl:2: 'caption' holds int; expected a caption"),
        (b'{"image": "../x.jpg", "caption": "x"}', "list.jsonl:2: image '../x.jpg' lies outside"),
        (b'{"image": "/etc/passwd", "caption": "x"}', "list.jsonl:2: image '/etc/passwd' lies outside"),
        (b'{"image": "loop.jpg", "caption": "x"}', "list.jsonl:2: image 'loop.jpg' is not a file"),
        (b'{"image": "gone.jpg", "caption": "x"}', "list.jsonl:2: image 'gone.jpg' is not a file"),
        (b'{"image": "\\u0000", "caption": "x"}', "list.jsonl:2: '\\x00' holds a zero character"),
        (b'{"image": "a.jpg", "caption": "\xff"}', "list.jsonl:2: not JSON"),
        (b'{"image": "a.jpg", "caption": "\\ud800"}', "list.jsonl:2: '\\ud800' holds half a character"),
        (b'{"image": "a.jpg", "caption": " "}', "list.jsonl:2: no caption in 'caption': 'caption' is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, pictures, capsys, line, expected):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    (pictures / "loop.jpg").symlink_to(pictures / "loop.jpg")
    (pictures / "list.jsonl").write_bytes(b'{"image": "a.jpg", "caption": "fine"}\n' + line + b"\n")
    assert expected in fails(capsys, make(tmp_path / "set", "--jsonl", pictures / "list.jsonl"))


def test_missing_and_empty_sources_are_named(tmp_path, capsys):
    assert "no such folder" in fails(capsys, make(tmp_path / "set", "--folder", tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "no .jpg" in fails(capsys, make(tmp_path / "set", "--folder", tmp_path / "empty"))
    assert "no such file" in fails(capsys, make(tmp_path / "set", "--jsonl", tmp_path / "absent.jsonl"))


@pytest.mark.launch
def test_an_error_in_a_worker_process_is_one_sentence_too(tmp_path, pictures):
    (pictures / "b.png").write_bytes(b"no picture")
    command = [sys.executable, "data_tools/make_shards.py", "--folder", pictures, "--out", tmp_path / "set"]
    command += ["--workers", "2", "--samples-per-shard", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "b.png: unreadable image" in done.stderr


# ---- class folders ---------------------------------------------------------------------------


@pytest.fixture
def classes(tmp_path) -> Path:
    """Three classes of one, two and one picture, a hidden folder, and a picture outside
    the class folders.
    """
    folder = tmp_path / "classes"
    for name in ("n02/a.JPEG", "n10/a.png", "n10/deep/b.png", "cat/c.webp", ".cache/x.png", "readme.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(folder / name)
    return folder


def test_sorted_sub_folders_give_the_class_numbers(tmp_path, classes, capsys):
    """The order is that of torchvision's ImageFolder, with which LlamaGen's models were
    trained.

    The manifest stores the names.
    """
    assert make(tmp_path / "set", "--class-folder", classes, "--image-size", 16) == 0
    assert "in 3 classes" in capsys.readouterr().out
    manifest = Manifest.read(tmp_path / "set")
    assert manifest.classes == ("cat", "n02", "n10") and manifest.num_samples == 4
    found = []
    for sample in all_samples(tmp_path / "set"):
        meta = json.loads(sample.members["json"])
        assert manifest.classes[int(sample.members["txt"])] == meta["class"]
        found.append((sample.members["txt"].decode(), meta["name"]))
    assert sorted(found) == [
        ("0", "cat/c.webp"),
        ("1", "n02/a.JPEG"),
        ("2", "n10/a.png"),
        ("2", "n10/deep/b.png"),
    ]
    assert check_shards.main([str(tmp_path / "set")]) == 0
    assert "3 classes" in capsys.readouterr().out


def test_an_invalid_class_folder_is_named(tmp_path, classes, capsys):
    assert "no such folder" in fails(capsys, make(tmp_path / "set", "--class-folder", tmp_path / "absent"))
    assert "no sub-folders in it; expected one per class" in fails(
        capsys, make(tmp_path / "set", "--class-folder", classes / "n02")
    )
    (classes / "empty").mkdir()
    assert "classes/empty: no .jpg" in fails(capsys, make(tmp_path / "set", "--class-folder", classes))


def test_a_caption_that_is_not_a_class_number_is_listed(tmp_path, classes, capsys):
    assert make(tmp_path / "set", "--class-folder", classes, "--image-size", 16) == 0
    rewrite(tmp_path / "set", with_member("txt", b"3"))
    assert check_shards.main([str(tmp_path / "set")]) == 2
    assert "sample 000000000: caption '3' is not a class number" in capsys.readouterr().err


# ---- encode_codes ----------------------------------------------------------------------------


class TheCaptions:
    """A caption encoder that gives the captions themselves."""

    def __call__(self, captions):
        return captions

    def excess(self, caption):
        return None


class FakeImageTokenizer:
    """The mean red of every quarter of a 16-pixel picture, as one of 32 codes."""

    name, image_size, grid, factor_sizes = "fake", 16, (2, 2), (32,)

    def __init__(self, weight_hash: str = "a" * 64):
        self.weight_hash, self.num_encoded = weight_hash, 0

    def to(self, device, memory_format=None):
        return self

    def encode(self, pixels):
        assert pixels.shape[1:] == (3, 16, 16) and -1 <= pixels.min() and pixels.max() <= 1
        self.num_encoded += len(pixels)
        means = torch.nn.functional.avg_pool2d(pixels[:, :1], 8).flatten(1)[..., None]
        return ((means + 1) / 2 * 31).round().long()


def encode(folder: Path, image_tokenizer, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(
        recognise,
        "image_tokenizer_from_arguments",
        lambda options: (image_tokenizer, torch.device("cpu")),
    )
    options = ["--image-tokenizer", "unused", "--batch-size", "2"]
    return encode_codes.main([str(folder), *options, *arguments])


def test_codes_are_those_of_the_pictures(tmp_path, monkeypatch):
    assert shapes(tmp_path / "set") == 0
    before = all_samples(tmp_path / "set")
    image_tokenizer = FakeImageTokenizer()
    assert encode(tmp_path / "set", image_tokenizer, monkeypatch) == 0
    assert Manifest.read(tmp_path / "set").codes.model_dump() == {
        "image_tokenizer": "fake",
        "weight_hash": "a" * 64,
        "grid": (2, 2),
        "factor_sizes": (32,),
        "crops": 1,
        "precision": "fp32",
    }
    for old, new in zip(before, all_samples(tmp_path / "set"), strict=True):
        red = np.asarray(decode_picture(old.members["jpg"], ""))[..., 0] / 255
        expected = np.round(red.reshape(2, 8, 2, 8).mean((1, 3)).reshape(1, 4, 1) * 31)
        assert np.abs(decode_codes(new.members["codes.npy"], "") - expected).max() == 0
        assert old.members == {name: value for name, value in new.members.items() if name != "codes.npy"}
    assert check_shards.main([str(tmp_path / "set")]) == 0


def test_encoding_twice_does_nothing_and_another_tokenizer_replaces(tmp_path, monkeypatch, capsys):
    out, again = tmp_path / "set", FakeImageTokenizer()
    assert shapes(out) == encode(out, FakeImageTokenizer(), monkeypatch) == 0
    before = content(out)
    assert encode(out, again, monkeypatch) == 0
    assert again.num_encoded == 0 and content(out) == before and "reusing" in capsys.readouterr().out
    assert shapes(out) == 0 and content(out) == before  # still the set that make_shards made
    assert encode(out, FakeImageTokenizer("b" * 64), monkeypatch) == 0
    assert Manifest.read(out).codes.weight_hash == "b" * 64
    assert check_shards.main([str(out)]) == 0


def test_interrupted_encoding_resumes_and_leaves_a_complete_set_meanwhile(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert shapes(whole) == shapes(cut) == encode(whole, FakeImageTokenizer(), monkeypatch) == 0
    before, dying, rest = content(cut), FakeImageTokenizer(), FakeImageTokenizer()
    real = dying.encode

    def encode_twice(pixels):
        if dying.num_encoded >= 4:
            raise KeyboardInterrupt
        return real(pixels)

    dying.encode = encode_twice
    assert encode(cut, dying, monkeypatch) == 130
    assert {path.name: path.read_bytes() for path in cut.iterdir() if path.is_file()} == before
    assert check_shards.main([str(cut)]) == 0
    assert encode(cut, rest, monkeypatch) == 0
    assert rest.num_encoded == 1 and content(cut) == content(whole)


@pytest.mark.parametrize("command", ["make", "another set", "encode-codes", "repair"])
def test_one_process_at_a_time_writes_into_a_folder(tmp_path, monkeypatch, capsys, command):
    """Of two that made one set, one ended with "...tmp: no such file or directory"."""
    out = tmp_path / "set"
    assert shapes(tmp_path / "whole") == shapes(out) == 0
    commands = {
        "make": lambda: shapes(out),
        "another set": lambda: shapes(out, "--overwrite", num_samples=3),
        "encode-codes": lambda: encode(out, FakeImageTokenizer(), monkeypatch),
        "repair": lambda: check_shards.main([str(tmp_path / "whole"), "--repair", str(out)]),
    }
    before = content(out)
    with storage.only_writer(out):
        assert f"{out}: another process is writing" in fails(capsys, commands[command]())
        assert content(out) == before and check_shards.main([str(out)]) == 0  # reading is free
        assert shapes(out, "--dry-run") == 0
    assert commands["make"]() == 0
    assert not (tmp_path / "new").exists()
    with storage.only_writer(tmp_path / "new" / "set"):
        pass
    assert not (tmp_path / "new").exists()


def test_what_does_not_fit_the_tokenizer_is_refused(tmp_path, monkeypatch, capsys):
    assert shapes(tmp_path / "set", "--image-size", "24") == 0
    sentence = fails(capsys, encode(tmp_path / "set", FakeImageTokenizer(), monkeypatch))
    assert "24 pixels" in sentence and "takes 16" in sentence
    assert "no such folder" in fails(capsys, encode(tmp_path / "absent", FakeImageTokenizer(), monkeypatch))


def ramp_set(folder: Path, size: int) -> Path:
    """Three pictures whose red rises from left to right, so that every crop differs
    from its mirror image.
    """
    folder.mkdir()
    for name, offset in (("a", 0), ("b", 5), ("c", 10)):
        pixels = np.tile(np.arange(size, dtype=np.uint8) * 10 + offset, (size, 1))
        Image.fromarray(np.stack([pixels, pixels.T, pixels * 0], axis=-1)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


def test_ten_crops_are_corners_and_centre_and_their_mirror_images():
    """Computed by hand: a picture of 5 x 5 pixels is cut to 2 x 2.

    A value is 10 times the row plus the column.
    """
    pixels = (torch.arange(5)[:, None] * 10 + torch.arange(5)).expand(3, 5, 5)
    crops = encode_codes.crops_of(pixels, 2, 10)
    assert crops.shape == (10, 3, 2, 2)
    assert crops[:5, 0, 0, 0].tolist() == [0, 3, 30, 33, 22]
    assert crops[5:, 0, 0, 0].tolist() == [4, 1, 34, 31, 22]
    assert crops[4, 0].tolist() == [[22, 23], [32, 33]] and crops[5, 0].tolist() == [[4, 3], [14, 13]]


def test_ten_crops_are_cached_per_picture(tmp_path, monkeypatch, capsys):
    """A row of codes.npy equals the codes of encoding that crop alone, for any batch
    size.
    """
    assert make(tmp_path / "set", "--folder", ramp_set(tmp_path / "in", 18), "--image-size", 18) == 0
    assert encode(tmp_path / "set", FakeImageTokenizer(), monkeypatch, "--crops", "10") == 0
    assert Manifest.read(tmp_path / "set").codes.crops == 10
    for sample in all_samples(tmp_path / "set"):
        codes = decode_codes(sample.members["codes.npy"], "")
        image = image_tokenizers.to_pixels([decode_picture(sample.members["jpg"], "")])[0]
        alone = torch.cat(
            [FakeImageTokenizer().encode(crop[None]) for crop in encode_codes.crops_of(image, 16, 10)]
        )
        assert codes.shape == (10, 4, 1) and np.array_equal(codes, alone)
        assert len(np.unique(codes, axis=0)) > 5
    assert check_shards.main([str(tmp_path / "set")]) == 0
    assert "codes of fake (10 crops)" in capsys.readouterr().out


def test_crops_need_larger_pictures_and_one_crop_the_exact_size(tmp_path, monkeypatch, capsys):
    folder = ramp_set(tmp_path / "in", 18)
    assert make(tmp_path / "exact", "--folder", folder, "--image-size", 16) == 0
    sentence = fails(capsys, encode(tmp_path / "exact", FakeImageTokenizer(), monkeypatch, "--crops", "10"))
    assert "10 crops need larger images" in sentence and "--image-size 17" in sentence
    assert make(tmp_path / "large", "--folder", folder, "--image-size", 18) == 0
    sentence = fails(capsys, encode(tmp_path / "large", FakeImageTokenizer(), monkeypatch))
    assert "make the shards with --image-size 16, or add --crops 10" in sentence


def test_round_trip_with_the_janus_tokenizer_and_the_loader(tmp_path):
    """make_shards -> encode_codes -> data.stream.

    The codes decode to the pixels, and every sample has its own caption.
    """
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    from mmtensorar import image_tokenizers
    from mmtensorar.data import checks, loader
    from mmtensorar.recipe import Data, Run, Train

    torch.manual_seed(0)
    small = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "num_res_blocks": 1,
    }
    JanusVQVAE(JanusVQVAEConfig(**small, channel_multiplier=[1, 1], num_patches=8)).save_pretrained(
        tmp_path / "vq"
    )
    assert shapes(tmp_path / "set", num_samples=4) == 0
    assert (
        encode_codes.main(
            [str(tmp_path / "set"), "--image-tokenizer", str(tmp_path / "vq"), "--device", "cpu"]
        )
        == 0
    )
    image_tokenizer = image_tokenizers.load(
        image_tokenizers.section({"name": "janus_vq", "path": str(tmp_path / "vq")})
    )
    recipe = SimpleNamespace(
        run=Run(name="test"),
        data=Data(shards=str(tmp_path / "set"), batch_size=4, uncond_rate=0),
        train=Train(steps=1),
        backbone=SimpleNamespace(name="fake"),
    )
    checks.preflight(recipe, image_tokenizer, TheCaptions(), world_size=2)
    codes, captions, uncond, *_ = next(loader.stream(recipe, TheCaptions(), rank=0, world_size=1))
    pictures = {
        sample.members["txt"].decode(): sample.members["jpg"] for sample in all_samples(tmp_path / "set")
    }
    pixels = [np.asarray(decode_picture(pictures[caption], "")) for caption in captions]
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(image_tokenizer.encode(pixels), codes) and not uncond.any()
    assert image_tokenizer.decode(codes).shape == pixels.shape


# ---- check_shards ----------------------------------------------------------------------------


def rewrite(folder: Path, change, *, hashed: bool = True) -> None:
    """Apply `change(samples)` to the first shard; with `hashed`, also update the
    manifest.
    """
    manifest = Manifest.read(folder)
    first = manifest.shards[0]
    written = write_tar(folder / first.name, change(list(iterate_tar(folder / first.name))))
    if hashed:
        first = first.model_copy(update={"sha256": written.sha256})
        manifest.model_copy(update={"shards": (first, *manifest.shards[1:])}).write(folder)


def with_member(extension: str, value: bytes):
    return lambda samples: [Sample(samples[0].key, samples[0].members | {extension: value}), *samples[1:]]


def tiny_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_member("jpg", b"no picture"), "00000.tar: sample 000000000: unreadable image"),
        (
            with_member("jpg", tiny_jpeg()),
            "00000.tar: sample 000000000: the image is 8x8; the manifest says 16x16",
        ),
        (
            with_member("png", tiny_jpeg()),
            "00000.tar: sample 000000000: expected one of jpg, png, webp, found jpg, png",
        ),
        (with_member("txt", b"\xff"), "00000.tar: sample 000000000: the caption is not UTF-8"),
        (with_member("json", b"{"), "00000.tar: sample 000000000: the json member is not JSON"),
        (
            with_member("codes.npy", b"\x80\x04."),
            "00000.tar: sample 000000000: codes.npy is not a plain numpy array",
        ),
        (with_member("codes.npy", members.encode_codes(np.full((1, 4, 1), 32, np.uint16))), "holds code 32"),
        (
            with_member("codes.npy", members.encode_codes(np.zeros((1, 5, 1), np.uint16))),
            "has shape [1, 5, 1]",
        ),
        (lambda samples: samples[:1], "00000.tar: 1 sample, the manifest says 2"),
        (
            lambda samples: [samples[0], samples[1]._replace(key="000000002")],
            "sample 000000002: the key is also in 00000",
        ),
        (
            lambda samples: [Sample(s.key, {"jpg": s.members["jpg"]}) for s in samples],
            "sample 000000000: no txt member",
        ),
    ],
)
def test_damage_is_listed_with_shard_and_key(tmp_path, monkeypatch, capsys, change, expected):
    folder = tmp_path / "set"
    assert shapes(folder) == encode(folder, FakeImageTokenizer(), monkeypatch) == 0
    rewrite(folder, change)
    assert check_shards.main([str(folder)]) == 2
    sentence = capsys.readouterr().err
    assert expected in sentence and "sha256" not in sentence


def test_every_problem_is_listed_not_only_the_first(tmp_path, capsys):
    assert shapes(tmp_path / "set") == 0
    rewrite(tmp_path / "set", with_member("txt", b""), hashed=False)
    (tmp_path / "set" / "00001.tar").write_bytes((tmp_path / "set" / "00001.tar").read_bytes()[:5000])
    assert check_shards.main([str(tmp_path / "set")]) == 2
    done = capsys.readouterr()
    assert done.err.count("error: ") == 5 and done.err.count("sha256") == 2
    assert "sample 000000000: the caption is empty" in done.err and "00001.tar: damaged or cut" in done.err
    # The tar is truncated in the last sample that is named.
    assert "sample 000000003: no txt member" in done.err and "5 problems" in done.out


@pytest.mark.launch
def test_hostile_and_missing_sets_are_one_sentence_from_the_command_line(tmp_path):
    """One set has a member whose name leaves the folder; one folder is not a set."""
    assert shapes(tmp_path / "set") == 0
    with tarfile.open(tmp_path / "set" / "00000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../../a.txt"))
    for folder, expected in ((tmp_path / "set", "is a path"), (tmp_path, "has no manifest.json")):
        command = [sys.executable, ROOT / "data_tools/check_shards.py", folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr
