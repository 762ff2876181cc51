"""Keep the trunk's output: made once, then read from the device's memory, main memory or a local disk.

A *view* is a split's images as they look in one epoch of the stream, or without augmentation. Its trunk
output is the same for every run. It is kept in the precision in which it was made. So what is read is
what would be computed, bit for bit.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

log = logging.getLogger(__name__)

AHEAD = 2  # blocks that a worker makes while another makes the one that it needs, at most
PATIENCE = 3  # times as long as a block takes: so long it waits for that one
POLL_SECONDS = 0.01
CONSTANT = -1  # instead of an epoch, for images that look the same in all of them

Make = Callable[[np.ndarray], torch.Tensor]  # trunk output [n, ...] of the images with these indices


class View(NamedTuple):
    """Which images, and how they look."""

    split: str
    images: int  # that are used
    seed: int = 0
    epoch: int = CONSTANT  # of the stream
    cut: str = ""  # how the images are put together, where a row depends on that


class Block(NamedTuple):
    """Some images of a view, which go through the trunk together."""

    view: View
    indices: np.ndarray  # of the images, in the split


@dataclass(frozen=True)
class Rows:
    """How trunk output is kept: a row of values for each image, the channels last, as it is made."""

    shape: tuple[int, ...]  # of an image's output
    dtype: torch.dtype
    device: torch.device  # that trains

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.values * self.dtype.itemsize

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """The rows of trunk output, [n, values]. Nothing is copied."""
        return (features.permute(0, 2, 3, 1) if features.dim() == 4 else features).flatten(1)

    def as_made(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as trunk output on the device, [n, ...]."""
        rows = rows.to(self.device, non_blocking=True)
        if len(self.shape) != 3:
            return rows.view(-1, *self.shape)
        channels, height, width = self.shape
        return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)


class Tier(Protocol):
    """A place for trunk output."""

    name: str
    budget: float  # bytes

    def takes(self, view: View) -> bool:
        """Whether the view is there, or has room."""

    def lacking(self, block: Block) -> np.ndarray:
        """Those of the block's indices that are not there."""

    def get(self, block: Block) -> torch.Tensor | None:
        """The block, on the device that trains. None if it is not whole there."""

    def put(self, block: Block, features: torch.Tensor) -> bool:
        """Keep the block, if there is room. Returns whether it is kept."""

    def close(self) -> None:
        """Give the place up."""


class Shared(Tier, Protocol):
    """A tier that the workers of a machine share."""

    def claims(self, block: Block) -> AbstractContextManager[bool]:
        """Whether nobody else makes the block. Nobody does in the `with` block then."""


class Memory:
    """Rows in the device's or in main memory, within a budget of bytes.

    If it is full, the later epochs of the stream go first: fewer trials come to them. A view's rows lie
    in the order in which they came, which is that of the stream. So a block is read without a copy.
    """

    def __init__(self, place: torch.device, budget: float, rows: Rows) -> None:
        self.name = "main memory" if place.type == "cpu" else "device memory"
        self.budget = budget
        self.is_on_device = place.type == rows.device.type
        self._place, self._rows = place, rows
        # So that the host does not wait for a copy to the device.
        self._is_pinned = rows.device.type == "cuda" and place.type == "cpu"
        self._kept: dict[View, _Kept] = {}

    @property
    def used(self) -> int:
        """Bytes of all views that are begun."""
        return sum(map(self._size, self._kept))

    @property
    def filled(self) -> int:
        """Bytes of the rows that are there."""
        return sum(len(kept) for kept in self._kept.values()) * self._rows.bytes

    def takes(self, view: View) -> bool:
        return view in self._kept or self._in_place_of(view) is not None

    def lacking(self, block: Block) -> np.ndarray:
        kept = self._kept.get(block.view)
        return block.indices if kept is None else kept.lacking(block.indices)

    def get(self, block: Block) -> torch.Tensor | None:
        kept = self._kept.get(block.view)
        rows = None if kept is None else kept.get(block.indices)
        return None if rows is None else self._rows.as_made(rows)

    def put(self, block: Block, features: torch.Tensor) -> bool:
        if block.view not in self._kept:
            displaced = self._in_place_of(block.view)
            if displaced is None:
                return False
            for view in displaced:
                del self._kept[view]
            try:
                self._kept[block.view] = _Kept(self._empty(block.view.images))
            except (MemoryError, RuntimeError):  # there is less than it seemed
                self.budget = self.used
                return False
        self._kept[block.view].put(block.indices, self._rows.of(features))
        return True

    def close(self) -> None:
        self._kept.clear()

    def _in_place_of(self, view: View) -> list[View] | None:
        """The views to give up for this one. None if it does not fit, or no other is less useful."""
        missing = self.used + self._size(view) - self.budget
        displaced = []
        for other in sorted(self._kept, key=lambda one: one.epoch, reverse=True):
            if missing > 0 and other.epoch > view.epoch:
                displaced.append(other)
                missing -= self._size(other)
        return displaced if missing <= 0 else None

    def _empty(self, images: int) -> torch.Tensor:
        shape = images, self._rows.values
        return torch.empty(shape, dtype=self._rows.dtype, device=self._place, pin_memory=self._is_pinned)

    def _size(self, view: View) -> int:
        size = view.images * self._rows.bytes
        return 1 << (size - 1).bit_length() if self._is_pinned else size  # as torch allocates it


class _Kept:
    """The rows of a view, of which some are there."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._numbers: dict[int, int] = {}  # of the rows, by the images' indices

    def __len__(self) -> int:
        return len(self._numbers)

    def lacking(self, indices: np.ndarray) -> np.ndarray:
        return indices[[index not in self._numbers for index in indices.tolist()]]

    def get(self, indices: np.ndarray) -> torch.Tensor | None:
        numbers = [self._numbers.get(index, -1) for index in indices.tolist()]
        if min(numbers) < 0:
            return None
        selection = _selection(numbers)
        if not isinstance(selection, slice) and self._rows.is_pinned():
            torch.cuda.synchronize()  # the host gathers what the device may still be copying
        return self._rows[selection]

    def put(self, indices: np.ndarray, rows: torch.Tensor) -> None:
        numbers = [self._numbers.setdefault(index, len(self._numbers)) for index in indices.tolist()]
        selection = _selection(numbers)
        if isinstance(selection, slice):
            self._rows[selection].copy_(rows, non_blocking=True)
        else:
            self._rows[selection] = rows.to(self._rows.device)


def _selection(numbers: list[int]) -> slice | list[int]:
    first = numbers[0]
    if numbers == [*range(first, first + len(numbers))]:
        return slice(first, first + len(numbers))  # copies nothing
    return numbers


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one type have the same bits. NaN may be among them."""
    return torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other)))


class FeatureStore:
    """Trunk output by view and block, in memories, the fastest first, and in a place that is shared."""

    def __init__(
        self, memories: Sequence[Memory] = (), shared: Shared | None = None, seconds: float = 1.0
    ) -> None:
        """An image's output takes so many seconds to make."""
        self._memories, self._shared, self._seconds = memories, shared, seconds
        self.reads: Counter[str] = Counter()  # blocks by the tier that had them, or the trunk

    def keeps(self, view: View) -> bool:
        """Whether a view is kept, or would be if it was made."""
        return any(tier.takes(view) for tier in self._tiers)

    def blocks(
        self, view: View, parts: Sequence[np.ndarray], make: Make, first: int = 0
    ) -> Iterator[torch.Tensor]:
        """The view's blocks from `first` on. `parts` has the indices of the images of each."""
        blocks = [Block(view, part) for part in parts]
        for number in range(first, len(blocks)):
            yield self._block(blocks[number : number + 1 + AHEAD], make)

    def leave_to_runs(self, left: float) -> None:
        """Take at most so many more bytes of the memory that the runs are in."""
        for memory in self._memories:
            if memory.is_on_device:
                memory.budget = min(memory.budget, memory.filled + max(left, 0))

    def close(self) -> None:
        """Give up all places."""
        counts = ", ".join(f"{number:,} from {place}" for place, number in self.reads.most_common())
        log.info("blocks of trunk output: %s", counts or "none")
        for tier in self._tiers:
            tier.close()

    @property
    def _tiers(self) -> list[Tier]:
        return [*self._memories, self._shared] if self._shared else [*self._memories]

    def _block(self, blocks: Sequence[Block], make: Make) -> torch.Tensor:
        """The first block. While another worker makes it, this one makes one of those behind it."""
        wanted = blocks[0]
        give_up = time.monotonic() + PATIENCE * self._seconds * len(wanted.indices)
        while (found := self._find(wanted)) is None:
            if self._shared is None or not self._shared.takes(wanted.view) or time.monotonic() > give_up:
                return self._made(wanted, make)
            block, made = self._made_one_of(blocks, self._shared, make)
            if made is None:
                time.sleep(POLL_SECONDS)
            elif block is wanted:
                return made
        return found

    def _made_one_of(
        self, blocks: Sequence[Block], shared: Shared, make: Make
    ) -> tuple[Block | None, torch.Tensor | None]:
        """Make the first of the blocks that is missing and that nobody makes."""
        for block in blocks:
            with shared.claims(block) as is_mine:
                if is_mine and len(shared.lacking(block)):
                    return block, self._made(block, make)
            if is_mine and block is blocks[0]:
                break  # it has just come
        return None, None

    def _find(self, block: Block) -> torch.Tensor | None:
        for number, tier in enumerate(self._tiers):
            if (found := tier.get(block)) is not None:
                self.reads[tier.name] += 1
                _keep(block, found, self._memories[:number])
                return found
        return None

    def _made(self, block: Block, make: Make) -> torch.Tensor:
        """Make what no place has of a block. Runs that learn from other images have made the rest."""
        indices = block.indices
        if not block.view.cut:
            lacking = min((tier.lacking(block) for tier in self._tiers), key=len, default=indices)
            indices = lacking if len(lacking) else indices  # what is all there cannot be read just now
        features = make(indices)
        self.reads["the trunk"] += 1
        part = block._replace(indices=indices)
        _keep(part, features, self._memories)
        if self._shared is not None:
            self._shared.put(part, features)
        if len(indices) == len(block.indices):
            return features
        whole = self._find(block)
        return make(block.indices) if whole is None else whole  # a place has taken no more


def _keep(block: Block, features: torch.Tensor, memories: Sequence[Memory]) -> None:
    """Keep a block in the first of the memories that takes it."""
    for memory in memories:
        if memory.put(block, features):
            return
