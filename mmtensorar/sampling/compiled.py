"""A whole pass as one compiled function, on a GPU as one CUDA graph.

On a GPU, sampling is bound by the launches of many small kernels. A compiled pass has
fewer, and a CUDA graph launches them all at once. A pass is compiled anew for each
number of pictures and of steps, and for each length of the prompts, padded to a multiple
of 16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from mmtensorar import ranks
from mmtensorar.sampling.state import DecodeState

Pass = Callable[[DecodeState, int], None]

# Compiled versions of a pass that are kept; torch keeps 8 unless told otherwise.
MOST_KEPT = 64


class CompiledPass:
    """A pass that is compiled when it is first called.

    Where that fails, a note says why, and the pass runs as it is from then on. It must
    make its last change to the state after all that can fail, so that it can be called
    again.
    """

    def __init__(self, run: Pass):
        self._run = run
        self._compiled: Pass | None = None
        self._failed = False

    def __call__(self, state: DecodeState, m: int) -> None:
        if self._failed:
            return self._run(state, m)
        if self._compiled is None:
            options = _options(state.device)
            self._compiled = torch.compile(self._run, fullgraph=True, dynamic=False, **options)
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_KEPT):
                torch.compiler.cudagraph_mark_step_begin()
                return self._compiled(state, m)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the compiler or its kernels cannot do
            self._failed = True
            if ranks.is_first():
                reason = str(error).strip().split("\n")[0]
                print(f"note: passes are not compiled: {type(error).__name__}: {reason}", file=sys.stderr)
        return self._run(state, m)


compiled = lru_cache(CompiledPass)


def _options(device: torch.device) -> dict[str, Any]:
    """How a pass is compiled.

    On a CPU its graph is made and run as it is. This saves nothing, but shows that the
    pass is one graph. Code that torch 2.15 generates for int32 on a CPU writes past the
    end of tensors: tried with 33 numbers in a row, right with 32 and 1,024.
    """
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}
