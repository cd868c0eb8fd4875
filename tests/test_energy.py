"""Energy counters: what is read, and that nothing is guessed."""

import ctypes

import pytest

from whp_fast import energy
from whp_fast.energy import EnergyMeter


class Nvml:
    """NVML's functions, with a counter in millijoules for each UUID; a status other than 0 is a failure."""

    def __init__(self, counters, status=0):
        self.counters, self.status = counters, status
        self.handles = list(counters)

    def nvmlInit_v2(self):
        return 0

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        if uuid.decode() not in self.counters:
            return 6
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = self.handles.index(uuid.decode()) + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        value._obj.value = self.counters[self.handles[handle.value - 1]]
        return self.status


def package(folder, name, value, most=1000, kind="package-0"):
    (folder / name).mkdir(exist_ok=True)
    for file, content in (("name", kind), ("energy_uj", value), ("max_energy_range_uj", most)):
        (folder / name / file).write_text(f"{content}\n")


def test_gpus_are_added_up_and_one_without_a_counter_leaves_no_sum(monkeypatch, tmp_path):
    nvml = Nvml({"GPU-a": 5_000, "GPU-b": 7_000, "GPU-other": 1})
    monkeypatch.setattr(energy, "_nvml", lambda: nvml)
    with EnergyMeter(["a", "b"], tmp_path) as meter:
        nvml.counters |= {"GPU-a": 6_500, "GPU-b": 7_250, "GPU-other": 10**9}
        assert meter.joules() == {"gpus": pytest.approx(1.75)}
    with EnergyMeter(["a", "gone"], tmp_path) as meter:
        assert meter.joules() == {}
    nvml.status = 3  # not supported
    with EnergyMeter(["a"], tmp_path) as meter:
        assert meter.joules() == {}


def test_without_a_driver_or_counters_there_is_no_figure(monkeypatch, tmp_path):
    def missing():
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(energy, "_nvml", missing)
    with EnergyMeter(["a"], tmp_path / "absent") as meter:
        assert meter.joules() == {}


def test_packages_are_counted_once_and_around_their_range(tmp_path):
    package(tmp_path, "intel-rapl:0", 900)
    package(tmp_path, "intel-rapl:1", 100)
    package(tmp_path, "intel-rapl:0:0", 5, kind="core")
    package(tmp_path, "intel-rapl:2", 5, kind="psys")
    with EnergyMeter(powercap=tmp_path) as meter:
        package(tmp_path, "intel-rapl:0", 50)  # went round
        package(tmp_path, "intel-rapl:1", 300)
        assert meter.joules() == {"processors": pytest.approx((150 + 200) / 1e6)}
        package(tmp_path, "intel-rapl:0", 60)
        assert meter.joules() == {"processors": pytest.approx((160 + 200) / 1e6)}
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("?")
        assert meter.joules() == {}
        package(tmp_path, "intel-rapl:1", 400)
        assert meter.joules() == {}  # what passed in between is not known
