import pytest

from turbodiff.plan.torch_compat import advise, conv3d_is_broken, pip_line


@pytest.mark.parametrize(
    ("torch", "cudnn", "broken"),
    [
        ("2.8.0", 91002, False),
        ("2.9.1+cu128", 91002, True),
        ("2.9.1", 91501, False),
        ("2.10.0", 91002, True),
        ("2.11.0", 91002, False),
        ("2.9.0", 0, False),
    ],
)
def test_the_conv3d_trap_is_torch_2_9_and_2_10_with_an_old_cudnn(torch, cudnn, broken):
    assert conv3d_is_broken(torch, cudnn) is broken


@pytest.mark.parametrize(
    ("driver", "part"), [(None, "/cpu"), ("550.54", "torch==2.8.0"), ("575.1", "cu128"), ("580.82", ">=2.11")]
)
def test_the_line_follows_the_driver(driver, part):
    assert part in pip_line(driver)
    assert "torchvision" not in pip_line(driver) and "cu121" not in pip_line(driver)


def test_each_trouble_has_its_own_warning():
    keys = [key for key, _ in advise("2.9.1", "12.4", 91002, "550.1", (12, 0)).warnings]
    assert keys == ["conv3d_trap", "pth_care", "sm120_cuda"]
    assert [key for key, _ in advise("2.13.0+cpu", "", 0, "580.1").warnings] == ["cpu_build"]
    assert advise("2.13.0", "13.0", 92000, "580.1", (8, 9)).warnings == ()
