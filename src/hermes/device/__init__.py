from hermes.device.device import DRIVERS, Device, Driver, find_device, find_devices
from hermes.device.plan import DevicePlan, plan_device
from hermes.device.rates import Rates, measure_rates
from hermes.device.source import DeviceSource, UnifiedSource

__all__ = [
    "DRIVERS",
    "Device",
    "DevicePlan",
    "DeviceSource",
    "Driver",
    "Rates",
    "UnifiedSource",
    "find_device",
    "find_devices",
    "measure_rates",
    "plan_device",
]
