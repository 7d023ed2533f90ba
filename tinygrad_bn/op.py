"""An op: a forward on raw arrays, and beside it the rule of its derivative.

    @op
    def tanh(x): return array_module(x).tanh(x)

    @tanh.def_vjp
    def _(g, out): return (g * (1 - out * out),)

A rule asks by parameter name for what it needs, and nothing else is kept alive:

    g                  the cotangent of the output (a tuple of them for several outputs)
    out                the output (likewise)
    x, y, ...          inputs, by the forward's names; a variadic input is a tuple
    x_shape, x_dtype, x_device   of an input, without keeping it
    axis, ...          options: the forward's keyword-only parameters
    mean, ...          residuals that the forward handed out beside its output with `saving`
    needs              for each flat input, whether its cotangent is wanted

It returns one cotangent or None per input; the engine sums broadcast axes back and casts to the
input's dtype. Where inputs share no work, one rule per input is shorter and keeps less:

    multiply.def_vjp(x=lambda g, y: g * y, y=lambda g, x: g * x)

Under `create_graph` the same rule receives Tensors. Floating residuals are then None: they depend
on the inputs, so the rule computes them again with ops (freezing them is the classic second-order
bug).

An op may name fused kernels: code for raw arrays that may answer instead of the forward or the
rule, or decline with NotImplemented. The generic form is the definition.

Nothing in this file knows the name of any op.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tinygrad_bn.backend import (
    ARRAY_TYPES,
    as_array,
    is_floating,
    kernels,
    placed,
    same_memory,
    saving,
    without_lists,
)
from tinygrad_bn.domain import Domain
from tinygrad_bn.grad_mode import grad_enabled
from tinygrad_bn.rule import Plan, Rule
from tinygrad_bn.tape import NEVER_WRITTEN, Node, Output, TensorBase, Version, new_tensor

_NOTHING: Mapping[str, Any] = {}

#: Every op of the library and of its users, by name; table-driven tests walk it.
REGISTRY: dict[str, Op] = {}


def op(
    forward: Callable | None = None,
    *,
    name: str | None = None,
    domain: Domain | None = None,
    view: bool = False,
    differentiable: bool = True,
) -> Any:
    """Return the `Op` whose forward is the decorated function; register it.

    forward: takes raw arrays positionally and options by keyword, returns an array, a tuple of
        arrays, or either inside `saving(...)`.
    name: what the registry and messages call it; None for the function's own.
    domain: plain data that says on which inputs the op must be right and where its kinks are;
        `testing` turns it into samples.
    view: the output may share the first input's memory.
    differentiable: False for ops such as comparisons, whose outputs never require grad.

    Raises TypeError for an array input with a default other than None.

    >>> import tinygrad_bn as tg
    >>> @tg.op
    ... def cube(x):
    ...     return x * x * x
    >>> @cube.def_vjp
    ... def _(g, x):
    ...     return (3 * g * x * x,)
    >>> x = tg.tensor([2.0], requires_grad=True)
    >>> cube(x).backward()
    >>> x.grad.item()
    12.0
    """

    def decorate(function: Callable) -> Op:
        made = Op(function, name or function.__name__, domain, view, differentiable)
        own = function.__module__.startswith("tinygrad_bn.")
        REGISTRY[made.name if own else f"{function.__module__}.{made.name}"] = made
        return made

    return decorate if forward is None else decorate(forward)


class Op:
    """A differentiable function of arrays; see the module's docstring for the protocol."""

    def __init__(
        self,
        forward: Callable,
        name: str,
        domain: Domain | None = None,
        view: bool = False,
        differentiable: bool = True,
    ):
        self.forward = forward
        self.name = name
        self.domain = domain
        self.view = view
        self.differentiable = differentiable
        self.rules: tuple[Rule, ...] = ()
        #: By which inputs require grad, a bit for each behind a leading 1. Only ever added to.
        # Threads share it, and where Python has no global lock these would lock it: `get`, and a
        # key that is equal but not the same object, as tuples are. (Small integers are the same.)
        self._plans: dict[int, Plan] = {}
        self.kernels: Mapping[str, str] = {}
        self.__doc__ = forward.__doc__
        self.__name__ = name
        self.__module__ = forward.__module__
        self.__wrapped__ = forward
        kinds = inspect.Parameter
        parameters = list(inspect.signature(forward).parameters.values())
        for p in parameters:
            if p.kind is kinds.POSITIONAL_OR_KEYWORD and p.default not in (kinds.empty, None):
                raise TypeError(
                    f"op {name}: {p.name} is positional, so an array, and cannot default to "
                    f"{p.default!r}; options are keyword-only, after a *"
                )
        self.inputs = tuple(p.name for p in parameters if p.kind is kinds.POSITIONAL_OR_KEYWORD)
        self.variadic = next((p.name for p in parameters if p.kind is kinds.VAR_POSITIONAL), None)
        self.defaults = {p.name: p.default for p in parameters if p.kind is kinds.KEYWORD_ONLY}

    def __repr__(self) -> str:
        return f"<op {self.name}({', '.join(self.inputs)})>"

    # --- declaring ---------------------------------------------------------------------------

    def def_vjp(self, rule: Callable | None = None, **per_input: Callable) -> Any:
        """Set the derivative: one rule for all inputs (as a decorator), or one per input by name.

        Returns the rule it was given, so that it can be called and tested by itself.
        """
        if (rule is None) == (not per_input):
            raise TypeError(f"{self.name}.def_vjp: give one rule, or rules by input name")
        self._plans = {}
        if rule is not None:
            self.rules = (Rule(self, rule, None),)
            return rule
        unknown = set(per_input) - set(self.inputs)
        if unknown:
            raise TypeError(
                f"{self.name}.def_vjp: {sorted(unknown)} are no inputs; it has {list(self.inputs)}"
            )
        self.rules = tuple(
            Rule(self, rule, self.inputs.index(name)) for name, rule in per_input.items()
        )
        return self

    def use_kernels(self, **families: str) -> None:
        """Name the modules of fused kernels, by family; each has `forward` and may have `vjp`.

        The modules are imported when first needed. `forward` takes what the op's forward takes,
        `vjp` what its (joint) rule takes; either declines with NotImplemented.
        """
        self.kernels = families

    # --- calling -----------------------------------------------------------------------------

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Return the output for arrays and Tensors given in order, and options by name."""
        if len(args) == 2 and not (options or self.kernels or self.view) and grad_enabled():
            return self._call_pair(*args)
        return self._call(args, options)[0]

    def call_with_residuals(self, *args: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
        """Return the output and the residuals that the forward handed out beside it."""
        return self._call(args, options)

    def served(self, *args: Any, **options: Any) -> Any:
        """Return what `call_with_residuals` does if a kernel serves it; else NotImplemented.

        For an op that is a chain of others: where no kernel answers, its caller runs these.
        """
        arrays = [arg.data if isinstance(arg, TensorBase) else arg for arg in args]
        with placed(self.name, arrays):
            out = self._from_kernels(without_lists(arrays), options)
        return out if out is NotImplemented else self._call(args, options, out)

    def _call_pair(self, x: Any, y: Any) -> Any:
        """Return the output for two inputs: what `_call` returns, in half the time.

        On small arrays an op is all bookkeeping, and most ops of a long chain are like x * y. So
        what `_call`, `record` and `Plan.keep` do is written out here for two inputs, one output,
        and rules that want nothing else. `_call` is asked where there is more to it.
        """
        array_x, array_y, from_x, from_y = x, y, None, None
        version_x = version_y = NEVER_WRITTEN
        if isinstance(x, TensorBase):
            array_x, version_x = x.data, x.version
            if x.requires_grad:
                from_x = x.node or x
            if x.view_of is not None and x.view_of != version_x[1]:
                self._refuse_stale_view()
        if isinstance(y, TensorBase):
            array_y, version_y = y.data, y.version
            if y.requires_grad:
                from_y = y.node or y
            if y.view_of is not None and y.view_of != version_y[1]:
                self._refuse_stale_view()
        needs, plans = 4 + 2 * (from_x is not None) + (from_y is not None), self._plans
        plan = plans[needs] if needs in plans else None  # noqa: SIM401  (`get` may lock)
        if plan is None or plan.pick is None or len(ARRAY_TYPES) > 1:
            return self._call((x, y), _NOTHING)[0]
        out = self.forward(array_x, array_y)
        if type(out) not in ARRAY_TYPES or out.dtype.kind != "f":
            return self._call((x, y), _NOTHING, out)[0]
        node = Node(plan, (from_x, from_y), out.shape, out.dtype)
        result = new_tensor(out, node)
        if plan.wants:
            node.saved = plan.pick((array_x, array_y, out))
            node.guards = plan.pick((version_x, version_y, result.version))
        return result

    def _call(
        self, args: tuple[Any, ...], options: Mapping[str, Any], out: Any = None
    ) -> tuple[Any, Any]:
        """Return output and residuals: unwrap `args`, run the forward, wrap what it made.

        out: what the forward made of them, if it has run.
        """
        if options and not self.defaults.keys() >= options.keys():
            args, options = self._bind(args, options)
        tensors = recording = False
        arrays: Any = []
        parents, versions = [], []
        for arg in args:
            if isinstance(arg, TensorBase):
                tensors = True
                if arg.view_of is not None and arg.view_of != arg.version[1]:
                    self._refuse_stale_view()
                arrays.append(arg.data)
                if arg.requires_grad:
                    recording = True
                    parents.append(arg.node or arg)
                else:
                    parents.append(None)
                versions.append(arg.version)
            else:
                arrays.append(arg)
                parents.append(None)
                versions.append(NEVER_WRITTEN)
        if out is None:
            if len(ARRAY_TYPES) > 1:  # a GPU's arrays are about
                with placed(self.name, arrays):
                    arrays = without_lists(arrays)
                    out = self._run(arrays, options)
            elif self.kernels:
                out = self._run(arrays, options)
            else:
                out = self.forward(*arrays, **options)
        residuals: Mapping[str, Any] = _NOTHING
        if type(out) not in ARRAY_TYPES:
            if type(out) is saving:
                out, residuals = out.out, out.residuals
            out = tuple(map(_proper, out)) if type(out) is tuple else _proper(out)
        if not tensors:
            return out, residuals
        if recording and self.differentiable and grad_enabled():
            result = self.record(arrays, parents, versions, out, options, residuals)
        else:
            result = tuple(map(new_tensor, out)) if type(out) is tuple else new_tensor(out)
        return self._noting_view(result, args) if self.view else result, residuals

    def record(
        self,
        arrays: Sequence[Any],
        parents: Sequence[Any],
        versions: Sequence[Version],
        out: Any,
        options: Mapping[str, Any],
        residuals: Mapping[str, Any] = _NOTHING,
    ) -> Any:
        """Return Tensor(s) around the raw `out` that remember how it was made from `arrays`.

        parents: where the cotangent of each of `arrays` goes: a node, a leaf, or None for nowhere.
        versions: of each of `arrays`.
        """
        absent = len(self.inputs) - len(arrays)
        if absent > 0:
            arrays, parents = [*arrays, *[None] * absent], [*parents, *[None] * absent]
            versions = [*versions, *[NEVER_WRITTEN] * absent]
        if type(out) is tuple:
            dtype: Any = tuple([o.dtype for o in out])
            floating = any(map(is_floating, dtype))
        else:
            dtype = out.dtype
            floating = dtype.kind == "f" or is_floating(dtype)
        if not floating:
            return tuple(map(new_tensor, out)) if type(out) is tuple else new_tensor(out)
        plan = self._plan(parents)
        if type(out) is tuple:
            node = Node(plan, parents, tuple([o.shape for o in out]), dtype)
            places = [Output(node, i) if is_floating(o.dtype) else None for i, o in enumerate(out)]
            result = tuple(map(new_tensor, out, places))
        else:
            node = Node(plan, parents, out.shape, dtype)
            result = new_tensor(out, node)
        plan.keep(node, arrays, versions, result, options, residuals)
        return result

    def _plan(self, parents: Sequence[Any]) -> Plan:
        """Return what to keep and how to go back where the inputs with parents require grad."""
        needs, plans = 1, self._plans
        for parent in parents:
            needs = 2 * needs + (parent is not None)
        if needs not in plans:
            if not self.rules:
                raise RuntimeError(
                    f"{self.name}: it has no derivative rule, but an input requires grad; define "
                    f"one with @{self.name}.def_vjp, or call it on .detach()ed Tensors"
                )
            plans[needs] = Plan(self, tuple([parent is not None for parent in parents]))
        return plans[needs]

    def pull_back(
        self, node: Node, g: Any, needs: Sequence[bool] | None, as_tensors: bool
    ) -> list[tuple[int, Any]]:
        """Return pairs of a flat input of `node` and its cotangent, raw or `as_tensors`.

        needs: for each flat input, whether it leads to where gradients are wanted (None: each
            input that requires grad does). The others, and those whose cotangent is None, which
            stands for zero, are left out. The engine calls this.
        """
        plan = node.plan
        saved: Any = plan.attached(node) if as_tensors else node.saved
        pairs = []
        for target, pull in plan.pulls:
            if target is None:
                needs = needs or plan.needs
                grads = self._pull_all(pull, saved, g, needs, as_tensors)
                return [(i, h) for i, h in enumerate(grads) if h is not None and needs[i]]
            if needs is None or needs[target]:
                h = pull(g, saved, needs)
                if h is not None:
                    pairs.append((target, h))
        return pairs

    def _pull_all(
        self, pull: Callable, saved: Sequence[Any], g: Any, needs: Sequence[bool], as_tensors: bool
    ) -> tuple[Any, ...]:
        """Return what a kernel, or else the joint rule, gives for all inputs."""
        grads = None if as_tensors else self._run_vjp(saved, g, needs)
        if grads is None:
            grads = pull(g, saved, needs)
        if type(grads) is not tuple or len(grads) != len(needs):
            raise TypeError(
                f"{self.name}: its derivative rule must return a tuple of {len(needs)} cotangents, "
                f"one per array input, but returned {_described(grads)}"
            )
        return grads

    def describe(self, index: int) -> str:
        """Return what a message calls the flat input `index` (-1: the output)."""
        if index < 0:
            return "output"
        return f"input {self.inputs[index]!r}" if index < len(self.inputs) else f"input {index}"

    # --- inside ------------------------------------------------------------------------------

    def _run(self, arrays: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Return the raw result: of the first kernel that does not decline, or generic."""
        out = self._from_kernels(arrays, options)
        return self.forward(*arrays, **options) if out is NotImplemented else out

    def _from_kernels(self, arrays: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Return the raw result of the first kernel that does not decline, or NotImplemented."""
        if self.kernels:
            for kernel in kernels.candidates(self.kernels, "forward", arrays):
                out = kernel(*arrays, **options)
                if out is not NotImplemented:
                    return out
        return NotImplemented

    def _run_vjp(self, saved: Sequence[Any], g: Any, needs: Sequence[bool]) -> Any:
        """Return what the first kernel that does not decline makes of `g`, or None."""
        if self.kernels:
            for kernel in kernels.candidates(self.kernels, "vjp", (g,)):
                grads = kernel(**self.rules[0].by_name(saved, g, needs))
                if grads is not NotImplemented:
                    return grads
        return None

    def _refuse_stale_view(self) -> None:
        if grad_enabled():
            raise RuntimeError(
                f"{self.name}: an input is a view of memory that was since assigned values that "
                f"require grad, of which the view knows nothing; take the view again, after the "
                f"assignment"
            )

    def _noting_view(self, result: Any, args: Sequence[Any]) -> Any:
        """Return `result`, sharing the version of the first input if it shares its memory."""
        source = args[0]
        if isinstance(source, TensorBase) and same_memory(result.data, source.data):
            result.version = source.version
            result.view_of = source.version[1]
        return result

    def _bind(self, args: tuple, options: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the call with array inputs that were passed by name moved to their places."""
        options = dict(options)
        named = {name: options.pop(name) for name in self.inputs if name in options}
        unknown = set(options) - set(self.defaults)
        twice = [name for name in self.inputs[: len(args)] if name in named]
        if unknown or twice:
            raise TypeError(
                f"{self.name}: unexpected {sorted(unknown) or twice}; it takes the arrays "
                f"{list(self.inputs)} and the options {sorted(self.defaults)}"
            )
        last = max(map(self.inputs.index, named), default=-1)
        return (*args, *(named.get(name) for name in self.inputs[len(args) : last + 1])), options


def _proper(out: Any) -> Any:
    """Return `out` as an array: NumPy's reductions give scalars where CuPy's give 0-d arrays."""
    return out if type(out) in ARRAY_TYPES else as_array(out)


def _described(grads: Any) -> str:
    if type(grads) is tuple:
        return f"{len(grads)}"
    return f"a {type(grads).__name__} (a single cotangent is written `return (gx,)`)"
