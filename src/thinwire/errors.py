"""The error tree. Each message is a sentence with the numbers in it and a way out.

    ThinwireError             exit status
        ConfigError           2
            HeldError         2
        DataError             2
        PlanError             2
        CheckpointError       2
            UnreadableError   2
        SaveError             1
        LinkError             1
            RankLost          1
        StopAsked             0
        LabError              1
        ShortOfMemory         1
        ProbeError            1
        DivergenceError       1
        SyncError             1
        UseError              1
            OtherExchangeError 1

The exit status is what the command line returns: 2 when the user's input is wrong, 1 when the run itself failed.
"""


class ThinwireError(Exception):
    """Anything thinwire raises on purpose."""

    exit_status = 1


class ConfigError(ThinwireError):
    """A configuration file, an override or a command-line value is wrong."""

    exit_status = 2


class HeldError(ConfigError):
    """A folder is locked by `holder`, who is named in words."""

    def __init__(self, sentence: str, holder: str) -> None:
        super().__init__(sentence)
        self.holder = holder


class DataError(ThinwireError):
    """A corpus, a token file or a tokenizer is missing, damaged or of another kind."""

    exit_status = 2


class PlanError(ThinwireError):
    """A plan is impossible on the cluster or for the model it is meant for."""

    exit_status = 2


class CheckpointError(ThinwireError):
    """What is on disk cannot be loaded, or belongs to something else."""

    exit_status = 2


class UnreadableError(CheckpointError):
    """Whether a checkpoint is whole cannot be told: the system does not let it be read, or the disk fails."""


class SaveError(ThinwireError):
    """What a run computed last could not be saved."""


class LinkError(ThinwireError):
    """Ranks could not meet, or lost each other."""


class RankLost(LinkError):
    """A collective cannot end because of `rank`, which the sentence names: it has ended, is stopped, or has not come."""

    def __init__(self, sentence: str, rank: int) -> None:
        super().__init__(sentence)
        self.rank = rank


class StopAsked(ThinwireError):
    """A stop was asked for before there was anything to stop."""

    exit_status = 0


class LabError(ThinwireError):
    """The emulated cluster could not be built on this machine, or broke."""


class ShortOfMemory(ThinwireError):
    """A process could not get the memory that it asked for: it needed `needed_bytes` or more, and has `capacity_bytes`."""

    def __init__(self, sentence: str, *, needed_bytes: int, capacity_bytes: int) -> None:
        super().__init__(sentence)
        self.needed_bytes, self.capacity_bytes = needed_bytes, capacity_bytes


class ProbeError(ThinwireError):
    """What a probe timed cannot be what the machine does."""


class DivergenceError(ThinwireError):
    """Training produced non-finite numbers too many times in a row."""


class SyncError(ThinwireError):
    """Replicas that should hold the same outer state do not."""


class UseError(ThinwireError):
    """A model was used in the user's own loop in a way that would give wrong numbers."""


class OtherExchangeError(UseError):
    """Two ranks are in exchanges of different tags, `mine` and `theirs`."""

    def __init__(self, message: str, mine: int, theirs: int) -> None:
        super().__init__(message)
        self.mine, self.theirs = mine, theirs
