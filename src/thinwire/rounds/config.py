"""`thinwire.rounds.config` is `thinwire.plan.sync` now; the old name stays for one release."""

import warnings

from thinwire.plan.sync import Sync, SyncConfig

__all__ = ["Sync", "SyncConfig"]

warnings.warn("thinwire.rounds.config is thinwire.plan.sync now", FutureWarning, stacklevel=2)
