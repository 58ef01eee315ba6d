"""The module's own `state_dict` and `load_state_dict` under any cut: they see whole parameters, the newest ones."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn


def hook_state_dict(module: nn.Module, whole: Callable[[], AbstractContextManager[None]], *, copies: bool) -> None:
    """Run both inside `whole()`, which all ranks enter together; `copies`: parameters do not outlive it."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    entered = ExitStack()

    def enter(*_: Any) -> None:
        entered.enter_context(whole())

    def after_state_dict(_: nn.Module, found: dict[str, Any], prefix: str, __: Any) -> None:
        for name in names:
            if copies and prefix + name in found:
                found[prefix + name] = found[prefix + name].clone()
        entered.close()

    def after_load(*_: Any) -> None:
        entered.close()

    for register, hook in (
        (module.register_state_dict_pre_hook, enter),
        (module.register_state_dict_post_hook, after_state_dict),
        (module.register_load_state_dict_pre_hook, enter),
        (module.register_load_state_dict_post_hook, after_load),
    ):
        register(hook)  # type: ignore[no-untyped-call]
