"""Conditions: what a network is told beside the noisy sample and the time; and what makes them of what people say.

Networks are called `network(x, t, **conditions)`: every condition has a name and is a tensor `(b, ...)`, one row a sample. A
network says with two attributes what it can be told::

    takes    frozenset of names
    null     the row, without the batch axis, that means "none", for each condition that can be left out

`label` (int64), `text` and `text_mask` (see `trigflow.conditions.text`), `guidance` (the scale that a student takes as an
input) and `end` (where a jump ends) are names that this package uses; a network of one's own may take any others.

A conditioner has an `Input` for each thing that can be said: a class by its number or name, a text, a row of numbers. One of
another kind is a class with `rows` and `state`, under its name in `INPUTS`.
"""

from trigflow.conditions.conditioner import INPUTS, Conditioner, said_of
from trigflow.conditions.encoded import Encoded
from trigflow.conditions.inputs import (
    Classes,
    Input,
    Numbers,
    check_class_names,
    check_labels,
    check_same_classes,
    named,
    printable,
)
from trigflow.conditions.text import Text
from trigflow.conditions.told import (
    OLD,
    ORDER,
    Conditions,
    check_declared,
    check_told,
    dropped,
    in_order,
    joined,
    null,
    null_rows,
    pick,
    quoted,
    rows_of,
    takes,
)  # fmt: skip

__all__ = [
    "INPUTS", "OLD", "ORDER", "Classes", "Conditioner", "Conditions", "Encoded", "Input", "Numbers", "Text",
    "check_class_names", "check_declared", "check_labels", "check_same_classes", "check_told", "dropped", "in_order", "joined",
    "named", "null",
    "null_rows", "pick", "printable", "quoted", "rows_of", "said_of", "takes",
]  # fmt: skip
