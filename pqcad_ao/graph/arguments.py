"""Arguments of a graph's calls under the names that their operators give them."""

import inspect
import keyword
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._C import FunctionSchema
from torch._ops import OpOverloadPacket
from torch.fx import Node

# Python's operators that ATen has under another name.
_RENAMED = {"truediv": "div"}


def bind(node: Node) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that it leaves out.

    Works on the graphs of torch.export and of torch.compile alike, whose calls are operators (``aten.cat.default``),
    torch's own functions (``torch.cat``), Python's (``operator.add``), and methods (``"transpose"``). An operator's
    names are those of its schema; its ``self`` is called ``input``, as in torch's functions.

    Raises:
        TypeError: the node calls no function of known names, or leaves out an argument that it needs.
    """
    given = {_name(name): value for name, value in node.kwargs.items()}
    for signature in _signatures(node.target):
        try:
            bound = signature.bind(*node.args, **given)
        except TypeError:
            continue
        bound.apply_defaults()
        return bound.arguments
    raise TypeError(f"the arguments of {node.format_node()} have no names that are known")


@cache
def _signatures(target: str | Callable[..., Any]) -> tuple[inspect.Signature, ...]:
    """The ways to call a node's target."""
    schema = getattr(target, "_schema", None)
    schema = getattr(schema, "schema", schema)  # ExecuTorch's operators wrap it
    if isinstance(schema, FunctionSchema):
        return (_signature(schema),)
    packet: Any = target
    if isinstance(target, str) or inspect.isbuiltin(target):  # written in C: its names are in the operator's schema
        name = target if isinstance(target, str) else target.__name__
        packet = getattr(torch.ops.aten, _RENAMED.get(name, name), None)
    if isinstance(packet, OpOverloadPacket):
        return tuple(_signature(getattr(packet, overload)._schema) for overload in packet.overloads())
    try:
        return (inspect.signature(target),) if callable(target) else ()
    except (TypeError, ValueError):  # a builtin that shows no signature
        return ()


def _signature(schema: FunctionSchema) -> inspect.Signature:
    kinds = {True: inspect.Parameter.KEYWORD_ONLY, False: inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return inspect.Signature(
        [
            inspect.Parameter(
                _name(argument.name),
                kinds[argument.kwarg_only],
                default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
            )
            for argument in schema.arguments
        ]
    )


def _name(name: str) -> str:
    """A schema's name as Python can write it."""
    if name == "self":
        return "input"
    return f"{name}_" if keyword.iskeyword(name) else name
