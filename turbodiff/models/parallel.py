"""One clip over several processes: every rank holds a share of the video tokens, and for self-attention of the heads.

DeepSpeed-Ulysses (arXiv 2309.14509). Each rank norms and rotates the queries and keys of its tokens, an all-to-all
turns a share of the tokens with all heads into all tokens with a share of the heads, each head attends on one rank as
it would alone, and a second all-to-all turns it back. All else of a block works token by token: nothing is sent.

A share is whole tiles of 128 tokens, the last one excepted, so that the INT8 tiles of linears and the blocks of
attention are those of one process. Shares need not be alike, and nothing is padded. In float32 on a CPU the velocity
is bit for bit that of one process, for every kind of attention, unless a share or a chunk of it is a single token: that
is another product. In 16 bits a product of fewer rows may round otherwise; so may the block means of SLA on a GPU,
which one process takes from sums before they are rounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from turbodiff_kernels.quant import quantize_tokens

from turbodiff.spec.shapes import token_shares

if TYPE_CHECKING:
    from turbodiff.spec.request import Exchange

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE_BYTES = 4  # one float32 per token and head travels behind its INT8 values


@dataclass(frozen=True)
class SequenceParallel:
    """This process' place among those that share a clip. All of them make the same calls in the same order.

    Args:
        group: of the processes, None for all of this program's.
        weights: of the same processes, for blocks that travel while attention exchanges (runtime/shared_blocks.py).
        int8: what attention takes and gives travels in INT8 with a scale per token and head: half the bytes of 16 bits,
            and the one case in which the velocity is not that of one process (3e-3 of it with the demo's weights).
        head_groups: parts of a rank's heads that travel by themselves, so that one attends while the next comes.
    """

    rank: int
    ranks: int
    group: dist.ProcessGroup | None = None
    int8: bool = False
    head_groups: int = 1
    weights: dist.ProcessGroup | None = None

    def exchanging(self, exchange: "Exchange") -> "SequenceParallel":
        """The same place, of processes that send each other what a plan's lever says."""
        return replace(self, int8=exchange == "int8")

    def share(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's tokens of all tokens along `dim`: a view."""
        counts = token_shares(x.shape[dim], self.ranks)
        return x.narrow(dim, sum(counts[: self.rank]), counts[self.rank])

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """All tokens [B, N, C] on every rank, of each rank's share [B, n, C]."""
        return self._receive(self._send([x] * self.ranks, token_shares(tokens, self.ranks)), len(x))

    def columns(self, width: int, rank: int | None = None) -> range:
        """This rank's strip of a picture's columns, or that of another."""
        rank = self.rank if rank is None else rank
        return range(width * rank // self.ranks, width * (rank + 1) // self.ranks)

    def gather_columns(self, x: Tensor, width: int) -> Tensor:
        """The picture [..., width] on every rank, of each rank's strip of columns [..., w]."""
        counts, rows = [len(self.columns(width, rank)) for rank in range(self.ranks)], x.flatten(0, -2)
        return self._receive(self._send([rows] * self.ranks, counts), len(rows)).view(*x.shape[:-1], width)

    def collect_frames(self, x: Tensor, width: int) -> Tensor:
        """Frames [B, t, H, W, 3] on the first rank, of each rank's strip of a picture `width` latent pixels wide; none
        on the others."""
        scale = x.shape[-2] // len(self.columns(width))
        counts = [0 if self.rank else scale * len(self.columns(width, rank)) for rank in range(self.ranks)]
        rows = x.flatten(0, -3)
        exchange = self._send([rows, *[rows[:, :0]] * (self.ranks - 1)], counts)
        whole = self._receive(exchange, len(rows))
        return whole.view(*x.shape[:-2], sum(counts), x.shape[-1])

    def attend(self, attention: Attend, q: Tensor, k: Tensor, v: Tensor, heads: int, tokens: int) -> Tensor:
        """`attention` of this rank's tokens to all: q, k, normed and rotated, v and out [B, n, heads * D] of N tokens.
        q is overwritten.

        Args:
            attention: of q, k, v, out [B, N, h, D] with some of the heads.
        """
        assert heads % self.ranks == 0, f"{heads} heads do not divide by {self.ranks}"
        counts = token_shares(tokens, self.ranks)
        mine, own = [counts[self.rank]] * self.ranks, heads // self.ranks
        groups = min(self.head_groups, own)
        parts = [slice(own * group // groups, own * (group + 1) // groups) for group in range(groups)]
        packed = [self._packed(t.unflatten(-1, (heads, -1))).unflatten(2, (self.ranks, own)) for t in (q, k, v)]
        sent = [[self._send(t[:, :, :, local].unbind(2), counts) for t in packed] for local in parts]
        del packed
        back = []
        while sent:  # what travelled is freed as soon as it is of no use
            coming = sent.pop(0)
            y = attention(*[self._unpacked(self._receive(coming.pop(0), len(q)), q.dtype) for _ in (q, k, v)])
            back.append(self._send(self._packed(y).split(counts, dim=1), mine))
            del y
        out = torch.empty_like(q) if q.requires_grad else q  # which has been sent
        into = out.unflatten(-1, (self.ranks, own, -1))
        for local, exchange in zip(parts, back, strict=True):
            for rank, y in enumerate(self._wait(exchange, len(q))):
                into[:, :, rank, local] = self._unpacked(y, q.dtype)
        return out

    def _packed(self, x: Tensor) -> Tensor:
        """Heads [B, n, h, D] as they travel."""
        return _to_int8(x) if self.int8 else x

    def _unpacked(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _from_int8(x, dtype) if self.int8 else x

    def _send(self, parts: Sequence[Tensor], counts: Sequence[int]) -> "_Exchange":
        """Start sending to each rank its part [B, n, ...], of which each sends back so many tokens."""
        batch, _, *rest = parts[0].shape
        per_token = batch * torch.Size(rest).numel()
        sizes = [per_token * n for n in counts], [part.numel() for part in parts]
        outgoing, incoming = _joined(parts), parts[0].new_empty(sum(sizes[0]))
        work = dist.all_to_all_single(incoming, outgoing, *sizes, group=self.group, async_op=True)
        return _Exchange(work, incoming, outgoing, tuple(counts), tuple(rest))

    def _wait(self, exchange: "_Exchange", batch: int) -> list[Tensor]:
        """What came from each rank, [B, n, ...]."""
        exchange.work.wait()
        shapes = [(batch, n, *exchange.rest) for n in exchange.counts]
        pieces = exchange.incoming.split([torch.Size(shape).numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def _receive(self, exchange: "_Exchange", batch: int) -> Tensor:
        """All that came, [B, N, ...]; of one sample it lies so already."""
        parts = self._wait(exchange, batch)
        if batch == 1:
            return exchange.incoming.view(1, sum(exchange.counts), *exchange.rest)
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _Exchange:
    """An all-to-all on its way; `outgoing` must stay until it is done."""

    work: dist.Work
    incoming: Tensor
    outgoing: Tensor
    counts: tuple[int, ...]
    rest: tuple[int, ...]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The elements of all parts one behind the other; without a copy where they lie so."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage()._cdata == first.untyped_storage()._cdata
        if not (same and part.is_contiguous() and part.storage_offset() == end):
            break
        end += part.numel()
    else:
        return first.as_strided((end - first.storage_offset(),), (1,))
    numels = [part.numel() for part in parts]
    joined = first.new_empty(sum(numels))
    for place, part in zip(joined.split(numels), parts, strict=True):
        place.view(part.shape).copy_(part)
    return joined


def _to_int8(x: Tensor) -> Tensor:
    """Heads [B, n, h, D] -> int8 [B, n, h, D + 4]: values and the bytes of their float32 scale."""
    values, scale = quantize_tokens(x.flatten(0, -2))
    packed: Tensor = torch.cat((values, scale[:, None].view(torch.int8)), dim=-1).unflatten(0, x.shape[:-1])
    return packed


def _from_int8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `_to_int8` was given, rounded."""
    values, scale = x[..., :-SCALE_BYTES], x[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    out = torch.empty_like(values, dtype=dtype)
    torch.mul(values, scale, out=out)  # no float32 copy of it all
    return out
