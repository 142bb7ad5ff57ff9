"""Memory in use, and its peak over a piece of work: resident set on a CPU, allocator on CUDA.

On Linux the kernel's high-water mark is reset when the measurement starts; elsewhere, or where
/proc may not be written, the mark is that of the whole process so far (`resettable` is False).
"""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CLEAR_REFS, _STATUS = "/proc/self/clear_refs", "/proc/self/status"


class PeakMemory:
    """`with PeakMemory(device) as peak: work()`, then `peak.bytes` and `peak.extra_bytes`.

    `bytes` is the peak of the whole process (CPU) or of torch's allocator on the device (CUDA);
    `extra_bytes` is that less what was in use at the start. `read()` gives the peak so far.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = str(device)
        self.cuda = self.device.startswith("cuda")
        self.resettable = True
        self.start_bytes = self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.resettable = _reset_high_water_mark()
        self.start_bytes = self._in_use()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self.read()

    @property
    def extra_bytes(self) -> int:
        return max(0, self.bytes - self.start_bytes)

    def read(self) -> int:
        """The peak since the start, in bytes."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        return _status_bytes("VmHWM") if self.resettable else _process_peak()

    def _in_use(self) -> int:
        return in_use(self.device) if self.cuda or self.resettable else _process_peak()


def in_use(device: torch.device | str = "cpu") -> int:
    """Bytes in use now: of torch's allocator on CUDA, else the resident set, by Linux's /proc."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS")


def _reset_high_water_mark() -> bool:
    try:
        with open(_CLEAR_REFS, "w") as file:
            file.write("5")
        return _status_bytes("VmHWM") > 0
    except OSError:
        return False


def _status_bytes(key: str) -> int:
    with open(_STATUS) as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _process_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
