"""What the emulator raises. Kinds are numbered as in engine/common.h."""


class EmulatorError(Exception):
    """Base of everything the emulator finds.

    Attributes:
        sites: the instructions involved, as `ptx.Site`, the failing one last.
    """

    def __init__(self, message, sites=()):
        super().__init__(message)
        self.sites = tuple(sites)


class PtxError(EmulatorError):
    """The PTX is malformed, or uses something that the emulator does not model."""


class LaunchError(EmulatorError):
    """The launch itself is impossible: arguments, sizes, registers."""


class RaceError(EmulatorError):
    """Two accesses, at least one of them a write, that nothing orders."""


class ProxyError(EmulatorError):
    """An asynchronous access to memory written through the generic proxy with no fence.proxy.async between."""


class ReadOnlyError(EmulatorError):
    """ld.global.nc or ldu of memory that the same launch writes."""


class BoundsError(EmulatorError):
    """An access outside every buffer, past the end of one, or a write to a read-only one."""


class AlignmentError(EmulatorError):
    """An address that is not aligned as the instruction requires."""


class UninitialisedError(EmulatorError):
    """A read of memory that nothing has written."""


class BarrierError(EmulatorError):
    """Misuse of a barrier or mbarrier."""


class DivergenceError(EmulatorError):
    """Threads that must execute one instruction together do not."""


class WgmmaError(EmulatorError):
    """Registers of a wgmma in flight are touched, or a wgmma.fence is missing."""


class AsyncCopyError(EmulatorError):
    """Misuse of an asynchronous copy."""


class TrapError(EmulatorError):
    """The kernel executed trap."""


class DeadlockError(EmulatorError):
    """No thread can run any more."""


class LivelockError(EmulatorError):
    """Threads run, but all of them only poll."""


class EmulatorTimeoutError(EmulatorError):
    """The launch exceeded its time limit."""


BY_KIND = (
    None,
    LaunchError,
    RaceError,
    ProxyError,
    ReadOnlyError,
    BoundsError,
    AlignmentError,
    UninitialisedError,
    BarrierError,
    DivergenceError,
    WgmmaError,
    AsyncCopyError,
    TrapError,
    DeadlockError,
    LivelockError,
    EmulatorTimeoutError,
)
