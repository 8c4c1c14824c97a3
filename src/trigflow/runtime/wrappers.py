"""Modules around modules, which add to the names of weights: what `torch.compile`, DataParallel, DDP and AveragedModel return.

Files hold weights by the names that they have without, so that a network is found again whatever it was wrapped in.
"""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

COMPILED = "_orig_mod"
"""Attribute of what `torch.compile(module)` returns that holds the module."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; itself where it has none."""
    while True:
        if isinstance(module, nn.DataParallel | DistributedDataParallel | AveragedModel):
            module = module.module
        elif _is_compiled(module):
            module = getattr(module, COMPILED)
        else:
            return module


def entries(module: nn.Module) -> dict[str, Tensor]:
    """`state_dict` of the module inside all wrappers, by the names that entries have when no part of it is compiled either."""
    module = unwrapped(module)
    return {plain: value for plain, (_, value) in _named(module).items()}


def load_entries(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """`load_state_dict` by the names of `entries`; they have to be all of them."""
    module = unwrapped(module)
    own = _named(module)
    module.load_state_dict({own[name][0] if name in own else name: value for name, value in tensors.items()})


def plain_name(name: str, own: dict[str, Tensor]) -> str:
    """The name of an entry in a file of earlier versions, where those of a wrapper may stand in it; `own` are the real ones."""
    without = name.replace(f"{COMPILED}.", "")
    return next((known for known in (name, without, without.removeprefix("module.")) if known in own), name)


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and hasattr(module, COMPILED)


def _named(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Entries with the names that they have and, as keys, those without the wrappers of compiled parts."""
    added = [f"{path}.{COMPILED}." for path, part in module.named_modules() if _is_compiled(part)]
    named = {}
    for name, value in module.state_dict().items():
        plain = name
        for prefix in reversed(added):  # parts come after what they are in
            if plain.startswith(prefix):
                plain = prefix.removesuffix(f"{COMPILED}.") + plain.removeprefix(prefix)
        named[plain] = (name, value)
    return named
