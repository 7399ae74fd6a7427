"""Reading tars by their headers: the result equals tarfile's, damage is located,
hostile members are never opened.
"""

import io
import shutil
import struct
import subprocess
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


def header(name: bytes, size: int | bytes, kind: bytes = b"0", *, is_signed: bool = False) -> bytes:
    """A header; size: a number, or the field as it is.

    is_signed: bytes above 127 count as negative.
    """
    field = size if isinstance(size, bytes) else b"%011o" % size
    head = bytearray(
        struct.pack("100s8s8s8s12s12s8s1s", name, b"0644", b"0", b"0", field, b"0", b" " * 8, kind)
    )
    head += bytes(512 - len(head))
    total = sum(head) - 256 * sum(byte > 127 for byte in head) * is_signed
    head[148:156] = b"%06o\0 " % total
    return bytes(head)


def test_announced_sizes_are_not_trusted(tmp_path):
    """A member larger than its file, or an extended header of gigabytes, is refused
    before anything is allocated.
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


# ---- tars of other programs ------------------------------------------------------------------


def record(key: bytes, value: bytes) -> bytes:
    """A record of an extended header, with its length in front."""
    length = len(key) + len(value) + 3
    while length != len(key) + len(value) + 3 + len(str(length)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def member(name: bytes, content: bytes = b"", kind: bytes = b"0", **fields: int | bytes) -> bytes:
    return header(name, fields.pop("size", len(content)), kind, **fields) + padded(content)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    return member(b"PaxHeaders/a", b"".join(record(*pair) for pair in records), kind)


END = bytes(1024)
A, B = member(b"a.txt", b"one"), member(b"b.txt", b"two")
RAW = bytes(range(256))  # not UTF-8, with a newline and an equals sign in it
SAME = [("a.txt", b"one"), ("b.txt", b"two")]

# Every one of these is read by GNU tar, bsdtar or Python's tarfile.
VALID = {
    "macOS: the attributes of the disk": pax((b"LIBARCHIVE.xattr.com.apple.quarantine", RAW)) + A + B + END,
    "tar --xattrs: raw bytes": pax((b"SCHILY.xattr.user.note", RAW), (b"mtime", b"1.5")) + A + B + END,
    "a resource fork of 3 MiB": pax((b"LIBARCHIVE.xattr.com.apple.ResourceFork", RAW * 12288)) + A + B + END,
    "a key that is not UTF-8": pax((b"SCHILY.xattr.user.\xff", b"1"), (b"SCHILY.acl.access", RAW))
    + A
    + B
    + END,
    "git archive": pax((b"comment", b"0" * 40), kind=b"g") + A + B + END,
    "records about all members, twice": pax((b"mtime", b"1"), kind=b"g") * 2 + A + B + END,
    "records about all members at the end": A + B + pax((b"comment", b"x"), kind=b"g") + END,
    "a name with another charset named": pax((b"hdrcharset", b"BINARY"), (b"path", b"a.txt"))
    + member(b"x", b"one")
    + B
    + END,
    "a name of 100 bytes taken back": pax((b"path", b"")) + A + B + END,
    "records with their padding counted": member(b"PaxHeaders/a", padded(record(b"mtime", b"1")), b"x")
    + A
    + B
    + END,
    "Solaris' records": pax((b"path", b"a.txt"), kind=b"X") + member(b"x", b"one") + B + END,
    "a size in a record": pax((b"size", b"3")) + member(b"a.txt", b"one", size=0) + B + END,
    "a label": member(b"backup", kind=b"V") + A + B + END,
    "GNU's long name and long link": member(b"././@LongLink", b"a.txt\0", b"L")
    + member(b"././@LongLink", b"x\0", b"K")
    + member(b"x", b"one")
    + B
    + END,
    "a file in one piece": member(b"a.txt", b"one", b"7") + member(b"b.txt", b"two", b"\0") + END,
    "a size in binary": header(b"a.txt", b"\x80" + (3).to_bytes(11, "big")) + padded(b"one") + B + END,
    "a size with spaces": header(b"a.txt", b"         3 \0") + padded(b"one") + B + END,
    "tar -b 8192": A + B + bytes(8192 * 512),
    "zeros of an odd length": A + B + bytes(3 * 2**20 + 77),
    "two blocks of zeros": A + B + bytes(1024),
}


@pytest.mark.parametrize("kind", VALID)
def test_valid_tars_of_other_programs_are_read(tmp_path, kind):
    """Attributes of files with raw bytes, and more than a MiB of zeros at the end, were
    called damage.
    """
    (tmp_path / "a.tar").write_bytes(VALID[kind])
    assert pairs(tmp_path / "a.tar") == SAME
    # Each sample alone, as training reads it.
    starts = shards.sample_starts(tmp_path / "a.tar")
    read = shards.read_samples(tmp_path / "a.tar", starts, [1, 0], ("txt",))
    assert [sample.members["txt"] for sample in read] == [b"two", b"one"]


SIGNED = member(b"\xc3\xa9.txt", b"one", is_signed=True) + END
FOLDERS = {
    "a folder": member(b"f/", kind=b"5") + A + B + END,
    "a folder with a size and no content": member(b"f", kind=b"5", size=4096) + A + B + END,
    "an old tar's folder": member(b"f/", kind=b"\0") + A + B + END,
    "a folder with a list of its files": member(b"f/", b"Ya.txt\0\0", b"D") + A + B + END,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_are_passed_over_where_they_may_be(tmp_path, kind):
    path = tmp_path / "a.tar"
    path.write_bytes(FOLDERS[kind])
    with tars.TarReader(path) as file:
        members = list(tars.iterate_members(file, path, folders=True))
    assert [(member.name, member.size) for member in members] == [("f/", 0), ("a.txt", 3), ("b.txt", 3)]
    with pytest.raises(tars.Damage, match="f is a link, folder or device"):
        pairs(path)


def test_a_checksum_of_signed_bytes(tmp_path):
    (tmp_path / "a.tar").write_bytes(SIGNED)
    assert pairs(tmp_path / "a.tar") == [("é.txt", b"one")]


REFUSED = {
    "a sparse file": (member(b"a.txt", b"one", b"S") + END, "a.txt is a sparse file"),
    "a sparse file of POSIX": (pax((b"GNU.sparse.major", b"1")) + A + END, "a sparse file"),
    "a size about all members": (
        pax((b"size", b"3"), kind=b"g") + A + END,
        "about all members gives their size",
    ),
    "a name about all members": (
        pax((b"path", b"x"), kind=b"g") + A + END,
        "about all members gives their path",
    ),
    "a name that is not UTF-8": (pax((b"path", b"\xff.txt")) + A + END, "a name that is not UTF-8"),
    "two tars in one file": (A + END + B + END, "several tars in one file"),
    "two tars, far apart": (A + bytes(2**21) + B + END, "several tars in one file"),
    "a negative size": (header(b"a.txt", b"\xff" * 12) + END, "expected a member's header"),
    "a huge size in binary": (header(b"a.txt", b"\x80" + b"\x7f" * 11) + END, "reaches beyond the end"),
    "a size that is no number": (pax((b"size", b"-1")) + A + END, "gives the size b'-1'"),
    "a record without an end": (member(b"x", b"30 path=a", b"x") + A + END, "a damaged extended header"),
    "a cut record": (pax((b"path", b"a.txt"))[:520], "damaged or cut"),
    "a long name of a MiB": (member(b"x", b"n" * 2**20, b"L") + A + END, "more than the 65536 allowed"),
    "a part of several": (member(b"a.txt", b"one", b"M") + END, "is a link, folder or device"),
    "one block of zeros": (A + bytes(512), "expected the end of the archive"),
    "no zeros": (A, "damaged or cut"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_a_sentence(tmp_path, kind):
    content, expected = REFUSED[kind]
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(tars.Damage, match=expected) as error:
        pairs(tmp_path / "a.tar")
    assert str(error.value).startswith(f"{tmp_path / 'a.tar'}: ")


def test_a_header_of_endless_records_is_refused(tmp_path):
    """Each record was copied with all that follow it: 16 MiB of them would have taken
    hours.
    """
    (tmp_path / "a.tar").write_bytes(member(b"x", b"6 a=b\n" * 2**21, b"x") + A + B + END)
    with pytest.raises(tars.Damage, match="a damaged extended header"):
        pairs(tmp_path / "a.tar")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_named_with_the_cure(tmp_path, suffix):
    with tarfile.open(tmp_path / "a.tar", f"w:{suffix}") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(tars.Damage, match="a.tar: compressed with .*mmtensorar shards make --tars"):
        pairs(tmp_path / "a.tar")


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes(tmp_path, form):
    (tmp_path / "files").mkdir()
    for name, content in SAME:
        (tmp_path / "files" / name).write_bytes(content)
    command = ["tar", "-c", "-b", "4096", f"--format={form}", "-f", tmp_path / "a.tar", "a.txt", "b.txt"]
    subprocess.run(command, cwd=tmp_path / "files", check=True)
    assert pairs(tmp_path / "a.tar") == SAME
