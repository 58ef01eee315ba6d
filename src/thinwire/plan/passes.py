"""In which order a pipeline stage computes: 1F1B and its interleaved form, as Megatron-LM runs them (arXiv 2104.04473, 2.2).

A stage without a pipeline is one stage: a forward and a backward of each micro-batch in turn. Pure, no torch.
"""

from typing import NamedTuple


class Pass(NamedTuple):
    """One forward or backward of one chunk for one micro-batch."""

    forward: bool
    micro_batch: int
    chunk: int

    @property
    def phase(self) -> str:
        return "forward" if self.forward else "backward"


def passes(stage: int, stages: int, micro_batches: int, chunks: int) -> list[Pass]:
    """The passes of `stage` in order: forwards to fill the pipeline, one forward one backward, backwards to empty it."""
    total = micro_batches * chunks
    if chunks == 1:
        filling = min(stages - stage - 1, total)
    else:
        filling = total if micro_batches == stages else min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)
    ahead = [_pass(True, k, stages, chunks) for k in range(total)]
    back = [_pass(False, k, stages, chunks) for k in range(total)]
    found = ahead[:filling]
    for k in range(total - filling):
        found += [ahead[filling + k], back[k]]
    return found + back[total - filling :]


def _pass(forward: bool, k: int, stages: int, chunks: int) -> Pass:
    """The k-th forward (backward) of a stage: `stages` micro-batches go through a chunk before the next chunk's turn."""
    if chunks == 1:
        return Pass(forward, k, 0)
    turn, inside = divmod(k, stages * chunks)
    chunk, which = divmod(inside, stages)
    return Pass(forward, turn * stages + which, chunk if forward else chunks - 1 - chunk)


def before(each: Pass, stage: int, stages: int, chunks: int) -> tuple[int, Pass] | None:
    """The (stage, pass) whose output `each` needs from another stage or chunk; none for what begins or turns round."""
    return _beside(each, stage, stages, chunks, -1 if each.forward else 1)


def after(each: Pass, stage: int, stages: int, chunks: int) -> tuple[int, Pass] | None:
    """The (stage, pass) that needs the output of `each`: the mirror of `before`."""
    return _beside(each, stage, stages, chunks, 1 if each.forward else -1)


def _beside(each: Pass, stage: int, stages: int, chunks: int, step: int) -> tuple[int, Pass] | None:
    adjacent, chunk = stage + step, each.chunk
    if not 0 <= adjacent < stages:
        chunk, adjacent = chunk + step, adjacent % stages
    if not 0 <= chunk < chunks:
        return None
    return adjacent, Pass(each.forward, each.micro_batch, chunk)
