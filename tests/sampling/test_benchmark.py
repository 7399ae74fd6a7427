"""benchmarks/decode.py times runs that make equal tokens, and refuses what it cannot
run.
"""

import pytest

from benchmarks import decode as benchmark

TINY = "--dim 16 --layers 2 --heads 2 --codes 11 --tokens 9 --runs 1 --threads 1".split()


def test_the_benchmark_compares_equal_tokens(capsys):
    """Our decoder and transformers' generate make the same greedy images while they are
    timed.
    """
    assert benchmark.main(["janus", *TINY]) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in table[2:]] == ["1", "8"]
    assert [row[-1].strip() for row in table[2:]] == ["100.00%", "100.00%"]
    assert all(float(cell) > 0 for row in table[2:] for cell in row[2:7])


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["llamagen"], "llamagen needs --reference"),
        (["llamagen", "--reference", "nowhere"], "--reference nowhere has no autoregressive/models/gpt.py"),
        (["janus", "--tokens", "8"], "--tokens is 8; expected a square"),
        (["janus", "--dim", "20"], "--dim is 20; expected a multiple of 8 and of 4 times --heads, 48"),
        (["janus", "--runs", "0"], "--runs is 0; expected 1 or more"),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_run(arguments, problem, capsys):
    assert benchmark.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
