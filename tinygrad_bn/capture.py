"""`capture(step)`: a step of training as one graph that a GPU replays, without Python in between.

A call on a GPU costs the host some microseconds for every operation; a small network's step is a
hundred of them, and the GPU waits. A recorded graph is launched once for all of them.

A graph repeats the same work on the same memory. So `capture` copies the inputs into memory of its
own, and the rest is what a step says of itself (`backend/recording.py`): what to do on the host
before each replay (step counts, numbers such as the learning rate, which are put where the graph
reads them), and what replays rely on. Whether that still holds is looked at before each one.

Nothing here knows CUDA: a `Recorder` makes the graphs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinygrad_bn.backend import kernels
from tinygrad_bn.backend.arrays import ARRAY_TYPES, backend_of, is_array
from tinygrad_bn.backend.devices import backend_for, device_of, get_default_device, parse
from tinygrad_bn.backend.placement import on
from tinygrad_bn.backend.recording import CaptureError, watched_by, watching
from tinygrad_bn.grad_mode import is_grad_enabled
from tinygrad_bn.step_watch import StepWatch
from tinygrad_bn.tape import TensorBase, new_tensor

#: Real calls of a signature before one is recorded. In the first, optimizers make their state; the
#: second takes the way of all later ones, so that no kernel is new when recording begins.
REHEARSALS = 2
#: What is held at once for one callable, and how often one signature may be recorded again because
#: something that replays rely on had changed. More than that is a step that changes all the time.
SIGNATURES = 16
AGAIN = 8


def capture(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does what `step` does, replayed as one graph on a GPU.

    step: takes Tensors and arrays (in tuples, lists and dicts if it likes), and anything hashable
        beside them; returns Tensors or arrays likewise, or None. It may do a whole step of
        training: forward, backward, optimizer, schedule, running statistics.

    On the CPU the function simply calls `step`. On a GPU it makes one graph for each signature: the
    shapes and dtypes of Tensors and arrays, the values of the rest. The first two calls of a
    signature are ordinary steps, the third records one, and from then on it is replayed; each call
    is one step. Inputs are copied into memory of the graph, and must be on the GPU.

    Results are valid until the next call; copy what is to be kept. Parameters and buffers keep
    their memory, and so does `.grad` from replay to replay. What replays rely on is looked at
    before each: where a model was moved, frozen or put into evaluation, the step is recorded anew.
    `release()` gives back graphs and memory, as does the end of the function. Arrays that the step
    takes from elsewhere than its inputs, modules and optimizers must stay as they are.

    Raises CaptureError, with the reason, for what a graph cannot repeat: values read back to the
    host, random numbers (Dropout), copies from the host, Python numbers that change.

    >>> import tinygrad_bn as tg
    >>> w = tg.nn.Parameter([1.0])
    >>> sgd = tg.optim.SGD([w], lr=0.25)
    >>> @tg.capture
    ... def step(x):
    ...     sgd.zero_grad()
    ...     loss = (w * x).sum()
    ...     loss.backward()
    ...     sgd.step()
    ...     return loss
    >>> step(tg.tensor([2.0])).item(), w.item()
    (2.0, 0.5)
    """
    return Captured(step)


class Captured:
    """What `capture` returns."""

    def __init__(self, step: Callable[..., Any]):
        functools.update_wrapper(self, step)
        self._step = step
        self._signatures: dict[Any, _Signature] = {}
        self._recorders: dict[str, Any] = {}
        #: Of a step without inputs: the device it was seen to run on.
        self._seen: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the step returns for these arguments."""
        inputs: list[Any] = []
        described = _describe((args, kwargs), inputs)
        device = self._device(inputs)
        if device is None or watching() is not None:  # a step inside a step is part of it
            return self._step(*args, **kwargs)
        with on(device):
            _check_inputs(inputs, device)
            key = device, described, is_grad_enabled(), kernels.chosen()
            signature = self._signatures.get(key)
            if signature is None:
                signature = self._signatures[key] = self._new_signature(device, inputs)
            return signature.run((args, kwargs), inputs)

    def release(self) -> None:
        """Let go of all graphs and of the memory that they work in."""
        self._signatures.clear()
        for recorder in self._recorders.values():
            recorder.release()
        self._recorders.clear()

    def __del__(self) -> None:
        if getattr(self, "_recorders", None) and not sys.is_finalizing():
            self.release()

    @property
    def graphs(self) -> int:
        """How many graphs are held."""
        return sum(len(signature.recordings) for signature in self._signatures.values())

    def _device(self, inputs: Sequence[Any]) -> str | None:
        """Return the device to record on, or None where the step is simply called."""
        for value in inputs:
            array = _raw(value)
            if backend_of(array).accelerator is not None:
                return device_of(array)
        if inputs or len(ARRAY_TYPES) == 1:
            return None
        device = self._seen or get_default_device()
        accelerator = backend_for(device).accelerator
        if accelerator is None:
            return None
        kind, index = parse(device)
        return f"{kind}:{accelerator.current() if index is None else index}"

    def _new_signature(self, device: str, inputs: Sequence[Any]) -> _Signature:
        if len(self._signatures) == SIGNATURES:
            raise CaptureError(
                f"capture: {self._name} was called with more than {SIGNATURES} signatures, each of "
                f"which holds a graph and its memory; give it inputs of few shapes, pass numbers "
                f"that change as Tensors, or call release() first"
            )
        recorder = self._recorders.get(device)
        if recorder is None:
            accelerator: Any = backend_for(device).accelerator
            recorder = self._recorders[device] = accelerator.recorder(parse(device)[1])
        return _Signature(self._name, self._step, recorder, inputs)

    @property
    def _name(self) -> str:
        return getattr(self._step, "__name__", "the step")


class _Signature:
    """One signature of a step: its inputs' memory, and the graphs that were recorded for it.

    There are several where something other than the inputs went back and forth, such as a model
    between training and evaluation.
    """

    def __init__(self, name: str, step: Callable[..., Any], recorder: Any, inputs: Sequence[Any]):
        self.name = name
        self.step = step
        self.recorder = recorder
        self.buffers = [_raw(value).copy() for value in inputs]
        self.recordings: list[_Recording] = []
        self.rehearsed = 0
        self.recorded = 0
        self.leaves: Sequence[Any] = ()

    def run(self, arguments: Any, inputs: Sequence[Any]) -> Any:
        """Return the result of one step: replayed, recorded or done."""
        for buffer, value in zip(self.buffers, inputs, strict=True):
            buffer[...] = _raw(value)
        broken = []
        for recording in self.recordings:
            reason = recording.broken()
            if reason is None:
                return recording.replay()
            broken.append(reason)
        if self.recorded > AGAIN:
            raise CaptureError(
                f"capture: {self.name} was recorded {self.recorded} times for the same inputs, "
                f"since from call to call {broken[-1]}; keep that as it is, or do without capture"
            )
        if self.rehearsed < REHEARSALS:
            return self._rehearse(arguments)
        return self._record(arguments)

    def _rehearse(self, arguments: Any) -> Any:
        """Return the result of the step after doing it as usual, watched for what it must not."""
        watch = StepWatch(self.recorder, recording=False)
        with watched_by(watch):
            result = self.recorder.rehearse(lambda: self._call(arguments))
        self.rehearsed += 1
        self.leaves = watch.leaves()
        return _results(self.name, result)

    def _record(self, arguments: Any) -> Any:
        """Return the result of the step after recording it and launching the recording."""
        # Graphs of a model that has been moved since are of no use and hold memory.
        self.recordings = [r for r in self.recordings if not r.watch.moved()]
        watch = StepWatch(self.recorder, recording=True, leaves=self.leaves)
        with watched_by(watch):
            result, graph = self.recorder.record(lambda: self._call(arguments))
        recording = _Recording(watch, graph, _results(self.name, result))
        watch.finish(self.name)
        self.recordings.append(recording)
        self.rehearsed, self.recorded = 0, self.recorded + 1
        graph.launch()
        return recording.results()

    def _call(self, arguments: Any) -> Any:
        buffers = iter(self.buffers)
        args, kwargs = _rebuilt(arguments, buffers)
        return self.step(*args, **kwargs)


class _Recording:
    """A graph, what belongs to it on the host, and its results."""

    def __init__(self, watch: StepWatch, graph: Any, result: Any):
        self.watch = watch
        self.graph = graph
        self.result = result

    def broken(self) -> str | None:
        """Return what keeps a replay from being right, in words, or None."""
        return self.watch.broken()

    def replay(self) -> Any:
        """Return the results after launching the graph for the next step."""
        for action in self.watch.actions:
            action()
        self.graph.launch()
        self.watch.restore_gradients()
        return self.results()

    def results(self) -> Any:
        """Return the results as new Tensors around the memory of the graph."""
        return _mapped(self.result, lambda value: new_tensor(value.data))


# --- arguments and results ---------------------------------------------------------------------


def _raw(value: Any) -> Any:
    return value.data if isinstance(value, TensorBase) else value


def _is_input(value: Any) -> bool:
    return isinstance(value, TensorBase) or is_array(value)


def _describe(value: Any, inputs: list[Any]) -> Any:
    """Return what a signature keeps of an argument, hashable, and add its arrays to `inputs`."""
    if _is_input(value):
        inputs.append(value)
        raw = _raw(value)
        return type(value), raw.shape, raw.dtype.str, raw.dtype.name
    if isinstance(value, (tuple, list)):
        return type(value), tuple([_describe(entry, inputs) for entry in value])
    if isinstance(value, dict):
        return dict, tuple([(key, _describe(entry, inputs)) for key, entry in value.items()])
    try:
        hash(value)
    except TypeError:
        # By identity: what is inside may change, which the step is to say itself.
        return type(value), id(value)
    return type(value), value


def _rebuilt(value: Any, buffers: Any) -> Any:
    """Return an argument with its arrays replaced by the next of `buffers`."""
    if _is_input(value):
        buffer = next(buffers)
        return new_tensor(buffer) if isinstance(value, TensorBase) else buffer
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rebuilt(entry, buffers) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_rebuilt(entry, buffers) for entry in value)
    if isinstance(value, dict):
        return {key: _rebuilt(entry, buffers) for key, entry in value.items()}
    return value


def _check_inputs(inputs: Sequence[Any], device: str) -> None:
    for i, value in enumerate(inputs):
        there = device_of(_raw(value))
        if there != device:
            raise CaptureError(
                f"capture: input {i} is on {there!r} and others are on {device!r}; a graph takes "
                f"its inputs from one GPU: move it with x.to({device!r}), or load batches with "
                f"DataLoader(..., device={device!r})"
            )
        if isinstance(value, TensorBase) and value.requires_grad:
            raise CaptureError(
                f"capture: input {i} requires grad, which would go to the graph's own copy; call "
                f"requires_grad_() inside the step, and return the gradient"
            )


def _mapped(value: Any, change: Callable[[TensorBase], Any]) -> Any:
    """Return a result with `change` made to its Tensors."""
    if isinstance(value, TensorBase):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(entry, change) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(entry, change) for entry in value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    return value


def _results(name: str, result: Any) -> Any:
    """Return the result of a step without history; raise for what a replay cannot renew."""
    values: list[Any] = []
    _describe(result, values)
    for value in values:
        if backend_of(_raw(value)).accelerator is None:
            raise CaptureError(
                f"capture: {name} returns an array on the host, which replays would return again "
                f"as it is; compute it on the GPU"
            )
        node = getattr(value, "node", None)
        if node is not None and getattr(node, "saved", True) is not None:
            raise CaptureError(
                f"capture: {name} returns a Tensor whose history is still to be walked, and a "
                f"replay makes none; call backward inside the step, return x.detach(), or run it "
                f"under no_grad()"
            )
    for value in _others(result):
        raise CaptureError(
            f"capture: {name} returns {value!r:.40}, a {type(value).__name__}, which replays would "
            f"return again as it is; return Tensors, and read them outside"
        )
    return _mapped(result, lambda value: new_tensor(value.data))


def _others(value: Any) -> list[Any]:
    """Return what is neither Tensor, array nor None in a result."""
    if value is None or _is_input(value):
        return []
    if isinstance(value, (tuple, list)):
        return [other for entry in value for other in _others(entry)]
    if isinstance(value, Mapping):
        return [other for entry in value.values() for other in _others(entry)]
    return [value]
