"""Energy that a piece of work took, where the machine has counters that this process may read.

    GPUs         NVML's counter of each GPU's energy since the driver was loaded (Volta and later)
    processors   Linux's RAPL counters of whole processor packages (often for the superuser alone)

Both count everything that runs on a device meanwhile. Nothing is estimated: without a counter there is no
figure.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_LOOK_SECONDS = 60.0  # a package's counter runs round in a quarter of an hour or more


class EnergyMeter:
    """Measures from entering its ``with`` block on.

    Args:
        gpus: UUIDs of the GPUs at work, as torch gives them (without "GPU-").
    """

    def __init__(self, gpus: Sequence[str] = (), powercap: Path = POWERCAP):
        self._gpus, self._powercap = list(gpus), powercap

    def __enter__(self) -> EnergyMeter:
        self._gpus_before = _gpu_joules(self._gpus)
        self._packages = [_Package(folder) for folder in _package_folders(self._powercap)]
        self._left = threading.Event()
        if self._packages:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()

    def joules(self) -> dict[str, float]:
        """So far: ``{"gpus": joules, "processors": joules}``, with what cannot be read left out."""
        found = {}
        now = _gpu_joules(self._gpus)
        if now is not None and self._gpus_before is not None:
            found["gpus"] = now - self._gpus_before
        totals = [package.joules() for package in self._packages]
        if totals and None not in totals:
            found["processors"] = sum(totals)
        return found

    def _watch(self) -> None:
        while not self._left.wait(_LOOK_SECONDS):
            for package in self._packages:
                package.joules()


class _Package:
    """A counter of a processor package, in microjoules, that begins again at 0 beyond its range."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._range = _number(folder / "max_energy_range_uj")
        self._last, self._total = _number(folder / "energy_uj"), 0

    def joules(self) -> float | None:
        with self._lock:
            now = _number(self._folder / "energy_uj")
            if None in (now, self._last, self._range):
                self._last = None  # once unreadable, the sum has a hole
                return None
            self._total += now - self._last if now >= self._last else now + self._range - self._last
            self._last = now
            return self._total / 1e6


def _package_folders(powercap: Path) -> list[Path]:
    """Packages alone: ``intel-rapl:0``, and not their parts ``intel-rapl:0:0`` or the same once more as
    ``intel-rapl-mmio:0``."""
    return sorted(f for f in powercap.glob("intel-rapl:*") if f.name.count(":") == 1 and _is_package(f))


def _is_package(folder: Path) -> bool:
    try:
        return (folder / "name").read_text().startswith("package")
    except OSError:
        return False


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _gpu_joules(uuids: Sequence[str]) -> float | None:
    """The sum of the counters of these GPUs; None where one of them cannot be read, or there is none."""
    if not uuids:
        return None
    try:
        nvml = _nvml()
    except OSError:  # no driver
        return None
    if nvml.nvmlInit_v2():
        return None
    try:
        total = 0
        for uuid in uuids:
            handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
            if nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)):
                return None
            if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
                return None
            total += millijoules.value
        return total / 1e3
    finally:
        with contextlib.suppress(Exception):
            nvml.nvmlShutdown()


def _nvml():
    return ctypes.CDLL("libnvidia-ml.so.1")


def uuids_at_work(device, local_processes: int) -> list[str]:
    """UUIDs of the GPUs of this machine that a job uses: the first ``local_processes``, or that of the one
    process's device."""
    import torch

    if device.type != "cuda":
        return []
    numbers = range(local_processes) if local_processes > 1 else [device.index or torch.cuda.current_device()]
    found = [getattr(torch.cuda.get_device_properties(i), "uuid", None) for i in numbers]
    return [] if None in found else [str(uuid) for uuid in found]
