"""Errors: one base class and its few children.

They stand in the leaf package, so that every other one may raise them. A message says what was received, what was
expected and what to do next. Only the command line turns them into exit codes.
"""


class LowvramError(Exception):
    """Base of every error that lowvram raises on purpose.

    ``exit_code`` is 2 where the input, or what surrounds the run, has to change; 1 where the run failed.
    """

    exit_code = 1


class ConfigError(LowvramError):
    """An option or a configuration file has a value that cannot work."""

    exit_code = 2


class CheckpointError(LowvramError):
    """A published checkpoint, a LoRA or an artifact is missing, damaged or of another shape."""

    exit_code = 2


class InputError(LowvramError):
    """A portrait, a voice, a size or a path that cannot be used."""

    exit_code = 2


class HardwareError(LowvramError):
    """The device that was asked for is not there or cannot do what was asked."""

    exit_code = 2


class DeviceError(LowvramError):
    """The device failed while it worked: a copy or a kernel that did not come to its end."""


class OutOfMemoryError(LowvramError):
    """Bytes needed and bytes there do not fit; the message has both."""


class OutputError(LowvramError):
    """The result could not be written: a full disk, a folder that went away. Room has to be made first."""

    exit_code = 2


class FetchError(LowvramError):
    """What was asked of a hub did not come: no network, a failing server, other bytes than were published."""


class DistributedError(LowvramError):
    """A rank failed or the ranks do not agree."""
