"""One walker lists folders for all sources and evaluators: links are followed and
circles end, hidden files are left out, and whatever else is not read is counted and
named.
"""

import os
import socket
from pathlib import Path

import pytest

from mmtensorar.folders import FOLLOWED, LeftOut, walk


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def listed(root: Path, **options) -> tuple[list[str], dict[str, list[str]]]:
    left_out = LeftOut(root)
    found = walk(root, left_out, **options)
    assert all(left_out.counts[reason] >= len(names) for reason, names in left_out.names.items())
    return [path.relative_to(root).as_posix() for path in found], left_out.names


def test_the_order_without_links_is_that_of_the_parts_of_the_paths(tmp_path):
    names = ["b/a.png", "a.png", "a/z.png", "a-b/c.png", "a/deep/er/b.png", "B.png", "a.b/c.png"]
    found, left_out = listed(tree(tmp_path, *names))
    assert found == [str(path.relative_to(tmp_path)) for path in sorted(map(tmp_path.joinpath, names))]
    assert found[:3] == ["B.png", "a/deep/er/b.png", "a/z.png"] and not left_out


LINKS = {
    "to a folder outside": ({"in/more": "../out"}, ["in/a", "in/more/deep/x", "in/more/y"], []),
    "to a file outside": ({"in/y": "../out/y"}, ["in/a", "in/y"], []),
    "by an absolute path": ({"in/more": "/out"}, ["in/a", "in/more/deep/x", "in/more/y"], []),
    "in a linked folder": (
        {"in/more": "../out", "out/third": "../third"},
        ["in/a", "in/more/deep/x", "in/more/third/z", "in/more/y"],
        [],
    ),
    "to the folder itself": ({"in/self": "."}, ["in/a"], ["in/self"]),
    "to a folder above": (
        {"in/up": ".."},
        ["in/a", "in/up/out/deep/x", "in/up/out/y", "in/up/third/z"],
        ["in/up/in"],
    ),
    "a circle of two": (
        {"in/out": "../out", "out/in": "../in"},
        ["in/a", "in/out/deep/x", "in/out/y"],
        ["in/out/in"],
    ),
    "two to one folder": (
        {"in/m1": "../out", "in/m2": "../out"},
        ["in/a", "in/m1/deep/x", "in/m1/y"],
        ["in/m2"],
    ),
    "to a folder and to one in it": (
        {"in/m1": "../out/deep", "in/m2": "../out"},
        ["in/a", "in/m1/x", "in/m2/y"],
        ["in/m2/deep"],
    ),
    "to a neighbour": ({"in/0": "sub", "in/sub/b": "../a"}, ["in/a", "in/sub/b"], ["in/0"]),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_are_followed_and_circles_end(tmp_path, case):
    links, expected, again = LINKS[case]
    tree(tmp_path, "in/a", "out/deep/x", "out/y", "third/z")
    (tmp_path / "in" / "sub").mkdir()
    for name, target in links.items():
        (tmp_path / name).symlink_to(f"{tmp_path}{target}" if target.startswith("/") else target)
    found, left_out = listed(tmp_path / "in")
    assert [f"in/{name}" for name in found] == expected
    assert [f"in/{name}" for name in left_out.get("a folder that is listed already", [])] == again
    leads_out = any("out" in target or target == ".." for target in links.values())
    assert (FOLLOWED in left_out) == leads_out


def test_what_is_not_read_is_counted_with_its_reason(tmp_path, capsys, monkeypatch):
    root = tree(tmp_path / "in", "a.png", "._a.png", ".ipynb_checkpoints/a.png", ".git/x/y", "b/.DS_Store")
    (root / "lost.png").symlink_to("gone")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe.png")  # opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(root)  # the path of a socket must be short
        listener.bind("socket.png")
    found, left_out = listed(root)
    assert found == ["a.png"] and left_out == {
        "hidden": ["._a.png", ".git", ".ipynb_checkpoints"],  # and a fourth
        "a link without a target": ["loop", "lost.png"],
        "a device, pipe or socket": ["pipe.png", "socket.png"],
    }
    counted = LeftOut(root)
    walk(root, counted)
    counted.print()
    assert f"note: {root}: left out 4 (hidden): ._a.png, .git, .ipynb_checkpoints and 1 more\n" in (
        capsys.readouterr().err
    )


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path):
    root = tree(tmp_path / ".cache" / ".in", "a.png")
    assert listed(root) == (["a.png"], {})
    (tmp_path / "link").symlink_to(".cache")
    assert listed(tmp_path / "link" / ".in")[0] == ["a.png"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """pathlib's rglob passes over a folder without the right to read it, and says
    nothing.
    """
    tree(tmp_path, "a.png", "shut/b.png")
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "shut":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(OSError, match="shut"):
        listed(tmp_path)


def test_a_name_with_control_characters_stays_one_line(tmp_path, capsys):
    left_out = LeftOut(tmp_path)
    left_out.add("odd", tmp_path / "a\nb\x1b[31m\udcff")
    left_out.print()
    assert capsys.readouterr().err.count("\n") == 1
