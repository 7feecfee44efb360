"""Forward passes that run side by side: each one stops at every norm and waits for the others."""

import copy
from collections.abc import Callable, Sequence
from threading import Semaphore, Thread
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gng_d2.errors import InputError
from gng_d2.layers.running import calls_with

# The most threads that all passes have together: PyTorch gives each pass threads of its own, and keeps them.
MOST_THREADS = 256


class Pass(Thread):
    """A forward pass of ``model`` in its own thread. Only one pass runs at a time, as with coroutines.

    It has no gradients and no autocast. Hooks of the norms stop it, until :meth:`go_on` is called. ``name`` says in
    errors what runs.
    """

    def __init__(self, name: str, model: nn.Module, inputs: Any, num_threads: int):
        super().__init__(name=name, daemon=True)
        self.at: str | None = None  # the norm where it stopped, or None once it has ended
        self.tensor: Tensor | None = None  # the tensor at this norm
        self._model, self._inputs, self._num_threads = model, inputs, num_threads
        self._may_go, self._has_stopped = Semaphore(0), Semaphore(0)
        self._is_cancelled = self._has_begun = False
        self._error: BaseException | None = None

    def run(self):
        self._may_go.acquire()
        torch.set_num_threads(self._num_threads)
        try:
            self._forward()
        except BaseException as error:
            self._error = error
        self._has_stopped.release()

    @torch.no_grad()
    def _forward(self):
        first = next(self._model.parameters(), torch.empty(0))
        inputs = tree_map_only(Tensor, lambda x: x.to(first.device, copy=True), self._inputs)
        failed = None
        with torch.cuda.device_of(first):
            for args, kwargs in calls_with(inputs):
                try:
                    self._model(*args, **kwargs)
                    return
                except InputError:
                    raise
                except Exception as error:  # the user's code may raise any error
                    failed = failed or error
                    if self._has_begun:
                        break
        raise InputError(
            f"inputs: the {self.name}, {type(self._model).__name__}, cannot be run in eval mode: "
            f"{type(failed).__name__}: {failed}"
        ) from failed

    def stop(self, at: str, tensor: Tensor) -> None:
        """Stop at the norm called ``at``, which ``tensor`` has reached. The pass itself calls this, in its thread."""
        self.at, self.tensor, self._has_begun = at, tensor, True
        if not self._is_cancelled:
            self._has_stopped.release()
            self._may_go.acquire()
        if self._is_cancelled:
            raise _CancelledPass

    def go_on(self) -> None:
        """Run to the next stop, or to the end."""
        self.at = self.tensor = None
        self._may_go.release()
        self._has_stopped.acquire()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self._is_cancelled = True
        self._may_go.release()
        self.join()


class _CancelledPass(BaseException):
    """Ends a cancelled pass. It is no Exception, so that the user's code does not catch it."""


def run_in_step(
    model: nn.Module,
    reference: nn.Module,
    batches: Sequence[Any],
    at_stop: Callable[[str, list[tuple[Pass, Pass]]], None],
) -> None:
    """Run both networks on each batch, all at once, from stop to stop.

    Once all passes have stopped, ``at_stop(norm, pairs)`` is called for the pairs of passes that stopped at one norm,
    and these go on. The others wait for their turn. Of several batches each has a copy of the modules with the same
    tensors, because a forward may keep in its module what it needs later.

    Raises:
        InputError: the passes of a pair stop at different norms, or cannot be run, or a network cannot be copied.
    """
    num_threads = torch.get_num_threads()
    share = max(1, min(num_threads, MOST_THREADS // (2 * len(batches))))
    copied = _copied if len(batches) > 1 else lambda network: network
    pairs = [
        (
            Pass(f"model with batch {i} of {len(batches)}", copied(model), batch, share),
            Pass(f"reference with batch {i} of {len(batches)}", copied(reference), batch, share),
        )
        for i, batch in enumerate(batches, 1)
    ]
    passes = [one for pair in pairs for one in pair]
    try:
        for one in passes:
            one.start()
            one.go_on()
        while any(one.at for one in passes):
            for ours, theirs in pairs:
                if ours.at != theirs.at:
                    raise InputError(
                        f"inputs: with them the model reaches {ours.at or 'its end'} when the reference reaches "
                        f"{theirs.at or 'its end'}. Both must be the same network"
                    )
            norm = next(ours.at for ours, _ in pairs if ours.at)
            here = [pair for pair in pairs if pair[0].at == norm]
            at_stop(norm, here)
            for pair in here:
                for one in pair:
                    one.go_on()
    finally:
        for one in passes:
            if one.is_alive():
                one.cancel()
        torch.set_num_threads(num_threads)  # the number holds for new threads, too


def _copied(network):
    parameters = {id(parameter): parameter for parameter in network.parameters()}
    try:
        with patch.object(Tensor, "__deepcopy__", lambda tensor, _: tensor):  # also tensors that a forward has kept
            return copy.deepcopy(network, parameters)
    except Exception as error:  # the user's classes may raise any error
        raise InputError(
            f"inputs: several batches need copies of {type(network).__name__}, and it cannot be copied: "
            f"{type(error).__name__}: {error}. Give one batch"
        ) from error
