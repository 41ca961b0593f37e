from types import SimpleNamespace as Fake

import pytest

from shoal.errors import BadConfig
from shoal.hardware import Capability, ChosenDevice, Device, check_wish, choice, choose_device

GB = 10**9
CPU = Device("cpu", "an old PC", 16 * GB)


def machine(*gpus: Device) -> Capability:
    return Capability(memory_bytes=16 * GB, devices=(*gpus, CPU))


SMALL, LARGE = Device("cuda", "small", 4 * GB), Device("cuda", "large", 24 * GB)
HOST = ChosenDevice("cpu", 16 * GB)


@pytest.mark.parametrize(
    ("wanted", "gpus", "name"),
    [
        (1, (), "cpu"),
        (3, (SMALL,), "cuda:0"),
        (8, (SMALL,), "cpu"),  # the CPU has room for it
        (99, (SMALL,), "cuda:0"),  # nobody has: as much of it as fits
        (8, (SMALL, LARGE), "cuda:1"),
    ],
)
def test_auto_takes_the_gpu_with_the_most_memory_where_that_is_enough(
    wanted: int, gpus: tuple[Device, ...], name: str
) -> None:
    chosen = choose_device("auto", machine(*gpus), lambda memory: memory >= wanted * GB)
    assert chosen.name == name
    if name != "cpu":
        assert chosen.memory_bytes == gpus[int(name[-1])].memory_bytes


def test_what_is_asked_for_is_taken_even_where_it_is_small() -> None:
    both = machine(SMALL, LARGE)
    assert choose_device("cuda", both, lambda _: False) == ChosenDevice("cuda:0", 4 * GB)
    assert choose_device("cuda:1", both) == ChosenDevice("cuda:1", 24 * GB)
    assert choose_device("cpu", both) == HOST
    apple = machine(Device("mps", "Apple GPU", 8 * GB))
    assert choose_device("mps", apple) == ChosenDevice("mps", 8 * GB)
    assert choose_device("auto", apple) == HOST


def test_a_torch_without_cuda_is_told_from_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = Fake(__version__="2.9.0+cpu", version=Fake(cuda=None, hip=None))
    monkeypatch.setattr(choice, "find_torch", lambda: without)
    with pytest.raises(BadConfig, match=r"2\.9\.0\+cpu.*cannot use CUDA") as caught:
        choose_device("cuda", machine())
    assert "pip install" in caught.value.hint
    assert "cu128" in caught.value.hint
    monkeypatch.setattr(choice, "find_torch", lambda: Fake(version=Fake(cuda="13.0")))
    with pytest.raises(BadConfig, match="no CUDA GPU") as caught:
        choose_device("cuda", machine())
    assert "driver" in caught.value.hint


def test_a_gpu_beyond_the_last_is_refused_with_the_last_that_there_is() -> None:
    with pytest.raises(BadConfig, match="2 GPUs") as caught:
        choose_device("cuda:2", machine(SMALL, LARGE))
    assert "cuda:1" in caught.value.hint
    with pytest.raises(BadConfig, match="no Apple GPU"):
        choose_device("mps", machine())


@pytest.mark.parametrize("wish", ["", "gpu", "cuda:", "cuda:-1", "CUDA", "cuda:0 "])
def test_what_names_no_device_is_refused(wish: str) -> None:
    with pytest.raises(BadConfig, match="is no device"):
        check_wish(wish)
