"""The module's own `state_dict` and `load_state_dict` under any cut: they see whole parameters, the newest ones."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from thinwire.partition.hooks import Hook


def hook_state_dict(module: nn.Module, whole: Callable[[], AbstractContextManager[None]]) -> None:
    """Run both inside `whole()`, which all ranks enter together."""
    entered = ExitStack()

    def enter(*_: Any) -> None:
        entered.enter_context(whole())

    def leave(*_: Any) -> None:
        entered.close()

    for register, hook in (
        (module.register_state_dict_pre_hook, enter),
        (module.register_state_dict_post_hook, leave),
        (module.register_load_state_dict_pre_hook, enter),
        (module.register_load_state_dict_post_hook, leave),
    ):
        register(Hook(hook))  # type: ignore[no-untyped-call]
