"""The Layer Profiler's records: what was measured of a model and a machine, where it is kept, and when it is refused.

The passes that measure a model are run by `hermes.session.measure`; disk and kernels are measured here.
"""

from hermes.profile.calibrate import Calibration, calibrate_compute
from hermes.profile.delays import BlockSample, DelayModel, LinearFit, fit_delays
from hermes.profile.disk import measure_bandwidth, measure_drift, measure_touch, measure_windows
from hermes.profile.machine import machine_record
from hermes.profile.records import (
    PROFILE_VERSION,
    BandwidthRecord,
    ComputeRecord,
    MachineRecord,
    Profile,
    UnitRecord,
    block_samples,
)
from hermes.profile.store import latest_profile, load_profile, profile_path, save_profile
from hermes.profile.unpacking import measure_unpacking

__all__ = [
    "PROFILE_VERSION",
    "BandwidthRecord",
    "BlockSample",
    "Calibration",
    "ComputeRecord",
    "DelayModel",
    "LinearFit",
    "MachineRecord",
    "Profile",
    "UnitRecord",
    "block_samples",
    "calibrate_compute",
    "fit_delays",
    "latest_profile",
    "load_profile",
    "machine_record",
    "measure_bandwidth",
    "measure_drift",
    "measure_touch",
    "measure_unpacking",
    "measure_windows",
    "profile_path",
    "save_profile",
]
