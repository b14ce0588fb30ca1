"""Batches on their way to the device."""

import torch

from icmsr_core.train.run.transfer import Transfer


def test_a_tensor_is_copied_once_however_often_it_is_asked_for():
    transfer, sharp = Transfer(torch.device("meta")), torch.ones(2)
    first = transfer({"sharp": sharp, "t": torch.zeros(1)})
    second = transfer({"sharp": sharp, "t": torch.zeros(1), "latent": first["sharp"]})
    assert second["sharp"] is first["sharp"]
    assert second["latent"] is first["sharp"], "it is there already"
    assert second["t"] is not first["t"], "another tensor of the same name"
    assert all(value.device.type == "meta" for value in (*first.values(), *second.values()))


def test_batches_stay_as_they_are_on_the_cpu():
    batch = {"sharp": torch.ones(2)}
    assert Transfer(torch.device("cpu"))(batch)["sharp"] is batch["sharp"]
