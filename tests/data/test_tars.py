"""Reading tars by their headers: the result equals tarfile's, damage is located, hostile members
are never opened.
"""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmtensorar.data import shards, tars
from mmtensorar.data.shards import Sample


def pairs(path: Path) -> list[tuple[str, bytes]]:
    with tars.TarReader(path) as file:
        return [
            (member.name, tars.read_content(file, member, path))
            for member in tars.iterate_members(file, path)
        ]


def write(path: Path, entries: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for number, (name, content) in enumerate(entries.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = (
                len(content),
                1700000000.25 + number,
            )  # a fraction of a second needs an extended header
            tar.addfile(info, io.BytesIO(content))
    return path


ENTRIES = {"a.txt": b"one", "a.jpg": b"x" * 512, "b.txt": b"", "c.json": b"y" * 1025}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_forms_of_tar_are_read(tmp_path, form):
    """webdataset's writer puts an extended header before each member."""
    long = "n" * (90 if form == tarfile.USTAR_FORMAT else 300) + ".txt"
    entries = ENTRIES | {long: b"z"}
    assert pairs(write(tmp_path / "a.tar", entries, format=form)) == list(entries.items())


def test_tars_written_by_webdataset_are_read(tmp_path):
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "a.tar")) as sink:
        for key in ("0", "1"):
            sink.write({"__key__": key, "txt": f"caption {key}", "json": {"n": key}})
    samples = list(shards.iterate_tar(tmp_path / "a.tar"))
    assert [(sample.key, sample.members["txt"]) for sample in samples] == [
        ("0", b"caption 0"),
        ("1", b"caption 1"),
    ]


def test_any_sample_is_read_without_those_before_it(tmp_path):
    samples = [Sample(f"{n:03d}", {"jpg": bytes([n]) * 600, "txt": str(n).encode()}) for n in range(20)]
    path = tmp_path / "a.tar"
    shards.write_tar(path, samples)
    starts = shards.sample_starts(path)
    assert len(starts) == 21
    wanted = [13, 2, 19]
    assert list(shards.read_samples(path, starts, wanted, ("txt", "jpg"))) == [samples[n] for n in wanted]
    assert [s.members for s in shards.read_samples(path, starts, [5], ("txt",))] == [{"txt": b"5"}]


def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path):
    whole = write(tmp_path / "a.tar", ENTRIES, format=tarfile.USTAR_FORMAT).read_bytes()
    path = tmp_path / "cut.tar"
    for cut in range(1, 40):
        path.write_bytes(whole[: len(ENTRIES) * 512 * 2 * cut // 40])
        with pytest.raises(tars.Damage):
            pairs(path)


def test_a_changed_header_is_refused(tmp_path):
    whole = bytearray(write(tmp_path / "a.tar", ENTRIES, format=tarfile.USTAR_FORMAT).read_bytes())
    for place in range(0, 512, 7):
        changed = bytearray(whole)
        changed[1024 + place] ^= 0x11
        (tmp_path / "b.tar").write_bytes(changed)
        with pytest.raises(tars.Damage):
            pairs(tmp_path / "b.tar")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_members_that_are_not_plain_files_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(tars.Damage, match="sample a: member a.txt is a link, folder or device"):
        pairs(tmp_path / "a.tar")


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    head = bytearray(
        struct.pack("100s8s8s8s12s12s8s1s", name, b"0644", b"0", b"0", b"%011o" % size, b"0", b" " * 8, kind)
    )
    head += bytes(512 - len(head))
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def test_announced_sizes_are_not_trusted(tmp_path):
    """A member larger than its file, or an extended header of gigabytes, is refused before anything
    is allocated.
    """
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"a.txt", 2**32) + bytes(1024))
    with pytest.raises(tars.Damage, match="reaches beyond the end"):
        pairs(path)
    path.write_bytes(header(b"x", 2**32, b"x") + bytes(1024))
    with pytest.raises(tars.Damage, match="an extended header of 4294967296 bytes"):
        pairs(path)
    path.write_bytes(
        header(b"a.txt", -512) + bytes(1536)
    )  # int() accepts a sign: this tar would be read for ever
    with pytest.raises(tars.Damage, match="expected a member's header"):
        pairs(path)
    record = b"22 size=99999999999999\n"
    path.write_bytes(
        header(b"x", len(record), b"x") + record.ljust(512, b"\0") + header(b"a.txt", 1) + bytes(1536)
    )
    with pytest.raises(tars.Damage):
        pairs(path)


def test_sample_starts_check_the_headers(tmp_path):
    write(tmp_path / "a.tar", {"a.txt": b"1", "b.txt": b"2", "a.jpg": b"3"})
    with pytest.raises(ValueError, match="sample a: its members are not together"):
        shards.sample_starts(tmp_path / "a.tar")
    write(tmp_path / "b.tar", {"a.pkl": b"1"})
    with pytest.raises(ValueError, match="can run code"):
        shards.sample_starts(tmp_path / "b.tar")
    write(tmp_path / "c.tar", {"../a.txt": b"1"})
    with pytest.raises(ValueError, match="is a path"):
        shards.sample_starts(tmp_path / "c.tar")
    assert np.array_equal(
        shards.sample_starts(
            write(tmp_path / "d.tar", {"a.txt": b"", "b.txt": b""}, format=tarfile.USTAR_FORMAT)
        ),
        [0, 512, 1024],
    )
