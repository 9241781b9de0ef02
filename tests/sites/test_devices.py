"""Requested devices must exist."""

import pytest

from fedpool import ConfigError
from fedpool.sites.config import SiteConfig
from fedpool.sites.devices import missing_device, num_devices, why_missing


@pytest.mark.parametrize("gpus", ["0", "1, 0", "MIG-1c2f, 0", "GPU-77"])
def test_devices_that_are_there_and_ids_that_only_cuda_knows_are_accepted(gpus: str) -> None:
    assert why_missing(gpus, 2) is None


@pytest.mark.parametrize(
    ("gpus", "count", "words"),
    [
        ("99", 0, "gpus='99', but this machine has no CUDA device: leave gpus out to run on the CPU"),
        ("0,99", 4, "gpus='0,99' names device 99, but this machine has the devices 0 to 3"),
        ("1", 1, "gpus='1' names device 1, but this machine has only device 0"),
    ],
)
def test_a_device_that_is_not_there_is_named_with_those_that_are(gpus: str, count: int, words: str) -> None:
    assert why_missing(gpus, count) == words


def test_a_site_that_is_given_a_device_it_lacks_says_so_as_it_starts() -> None:
    with pytest.raises(ConfigError, match="site clinic: gpus='99'"):
        SiteConfig(name="clinic", store="s3://jobs", gpus="99").check_devices()
    SiteConfig(name="clinic", store="s3://jobs").check_devices()
    SiteConfig(name="clinic", store="s3://jobs", gpus="GPU-77").check_devices()


def test_the_first_device_is_there_exactly_where_there_is_one() -> None:
    assert (missing_device("0") is None) == (num_devices() > 0)
