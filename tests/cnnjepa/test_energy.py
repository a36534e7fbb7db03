import torch

from cnnjepa.energy import EnergyMeter, nvml_joules


def test_a_processor_tells_nothing() -> None:
    assert nvml_joules(torch.device("cpu")) is None
    assert EnergyMeter(None).joules is None


def test_energy_adds_up_over_resumes_and_a_part_that_is_unknown_makes_the_whole_unknown() -> None:
    counter = iter([1000.0, 1250.0, 7000.0, 7100.0, 9000.0])
    first = EnergyMeter(lambda: next(counter))
    told = first.joules
    assert told == 250
    second = EnergyMeter(lambda: next(counter))
    second.resume(told)
    assert second.joules == 350
    third = EnergyMeter(lambda: next(counter))
    third.resume(None)  # some steps were made on a device that tells nothing
    assert third.joules is None
