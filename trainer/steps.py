"""A run's training steps, on a GPU as CUDA graphs on a stream of the run's own.

A step has hundreds of small kernels. A GPU is done with one before the host has started the next, unless
a graph starts them all. And runs on streams of their own share the GPU.
"""

import logging
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from trainer.device import is_out_of_memory
from trainer.torch_file import said

log = logging.getLogger(__name__)

# Steps that the host may be ahead of the device. With more, nobody would know how far a run is.
AHEAD = 2

# Takes a step on features and targets. Returns the logits, and the loss times the images, float [1].
Compute = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


# Streams of ended runs. Torch would give a stream of a run that is at work again.
_free_streams: list[torch.cuda.Stream] = []


def _stream(device: torch.device) -> torch.cuda.Stream:
    if _free_streams:
        return _free_streams.pop()
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    features: torch.Tensor  # it reads these, and writes the outputs
    target: torch.Tensor
    outputs: tuple[torch.Tensor, torch.Tensor]


class Steps:
    """Takes a run's steps in order. With `graphs` the numbers are the same, bit for bit.

    What computes a step draws from `generator` alone, and reads the learning rate from `rate`.
    """

    def __init__(self, generator: torch.Generator, graphs: bool) -> None:
        self._generator, self._graphs = generator, graphs
        self.rate = torch.zeros((), device=generator.device)
        self.graph_bytes = 0  # of the GPU's memory that the graphs hold
        self._stream: torch.cuda.Stream | None = None
        if generator.device.type == "cuda":
            self._stream = _stream(generator.device)
            weakref.finalize(self, _free_streams.append, self._stream)
        self._pending: deque[torch.cuda.Event] = deque()
        self._is_ready: set[int] = set()  # batch sizes that have had a step
        self._captured: dict[int, _Captured] = {}  # by batch size

    def take(
        self, compute: Compute, features: torch.Tensor, target: torch.Tensor, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step. Read what it returns after `join`.

        `compute` is the same for all steps. It is not kept, as it would keep the run.
        """
        if self._stream is None:
            self.rate.fill_(rate)
            return compute(features, target)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self.rate.fill_(rate)
            outputs = self._on_stream(compute, features, target)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._pending.append(self._stream.record_event(done))
        for tensor in (features, target):  # their memory is not used again before the step is over
            tensor.record_stream(self._stream)
        if len(self._pending) > AHEAD:
            self._pending.popleft().synchronize()
        return outputs

    def join(self) -> None:
        """Let all that is asked of the device from now on come after the steps."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _on_stream(
        self, compute: Compute, features: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = len(features)
        # The first step of a size prepares what must not happen in a capture: the libraries' workspaces,
        # and the optimizer's state.
        if self._graphs and size in self._is_ready and size not in self._captured:
            self._capture(compute, features, target)
        self._is_ready.add(size)
        captured = self._captured.get(size)
        if captured is None:
            return compute(features, target)
        captured.features.copy_(features)
        captured.target.copy_(target)
        captured.graph.replay()
        logits, loss = captured.outputs  # the next replay writes them again
        return logits.clone(), loss.clone()

    def _capture(self, compute: Compute, features: torch.Tensor, target: torch.Tensor) -> None:
        """Make the graph of a step, which computes nothing yet. Where that fails, do without graphs."""
        generator_before = self._generator.clone_state()
        try:
            try:
                self._try_capture(compute, features, target)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # A capture cannot use memory that is kept free for other streams, or for ended runs.
                traceback.clear_frames(error.__traceback__)
                self._captured.clear()
                torch.cuda.empty_cache()
                self._try_capture(compute, features, target)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            log.warning("steps are not captured as CUDA graphs: %s", said(error))
            self._generator.graphsafe_set_state(generator_before)
            self._captured.clear()  # these would draw from the generator's other state
            self._graphs = False

    def _try_capture(self, compute: Compute, features: torch.Tensor, target: torch.Tensor) -> None:
        held = torch.cuda.memory_reserved(features.device)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        features, target = features.clone(), target.clone()
        # Graphs of one run never run at once, so they can use the same memory.
        pool = next((captured.graph.pool() for captured in self._captured.values()), None)
        # Not by `torch.cuda.graph`, which lets all runs wait, and gives free memory back.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            outputs = compute(features, target)
        finally:
            graph.capture_end()
        self._captured[len(features)] = _Captured(graph, features, target, outputs)
        self.graph_bytes += max(torch.cuda.memory_reserved(features.device) - held, 0)
