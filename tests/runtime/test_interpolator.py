"""Frames in between by RIFE's network with random numbers: their places, their memory, and files that are not its."""

import numpy as np
import pytest
import torch

from turbodiff.media.finishing import RawFrames
from turbodiff.memory_lab.dry_run import Ledger
from turbodiff.plan.finishing_costs import finish_costs
from turbodiff.runtime.device import Device
from turbodiff.runtime.finishing import interpolated_by, open_interpolator
from turbodiff.spec.errors import FileError
from turbodiff.spec.request import make_request
from turbodiff.spec.shapes import VideoShape
from turbodiff.weights.locate import inventory

WIDTH, HEIGHT = 96, 80
ASKED = {"prompt": "x", "seed": 1, "smooth_fps": 60, "interpolator": "rife.pkl"}


@pytest.fixture
def root(tmp_path):
    """A folder of weights with a file as RIFE's authors write it."""
    arch = pytest.importorskip("ccvfi.arch", reason="needs the extra `interpolate`")
    torch.manual_seed(0)
    network = arch.IFNet()
    tensors = {f"module.{name}": value for name, value in network.state_dict().items()}
    (tmp_path / "interpolators").mkdir()
    torch.save({**tensors, "module.teacher.weight": torch.zeros(3)}, tmp_path / "interpolators" / "rife.pkl")
    return tmp_path


def test_clip_frames_stay_and_the_network_makes_those_between_within_the_planned_memory(root):
    from ccvfi.arch.arch_utils.warplayer import backwarp_tenGrid

    here, told = inventory((root,)), []
    file = root / "interpolators" / "rife.pkl"
    assert [(one.kind, one.path) for one in here.networks] == [("interpolator", str(file))]
    pictures = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH, 3), np.uint8)
    raw = RawFrames.spill(root / "raw", [pictures], WIDTH, HEIGHT, 16)
    with Ledger("cpu") as ledger:
        shown = interpolated_by(file, raw, 60, Device.pick("cpu"), lambda *at: told.append(at))
        made = np.concatenate(list(shown))
    assert made.shape == (11, HEIGHT, WIDTH, 3) and told[-1] == (11, 11)
    assert np.array_equal(made[0], pictures[0]) and np.array_equal(made[8:], np.repeat(pictures[2:], 3, 0))
    network = open_interpolator(file)
    pair = torch.from_numpy(np.concatenate((pictures[:1], pictures[1:2]), 3)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        filled = torch.nn.functional.pad(pair, (0, 32, 0, 48), mode="replicate")
        between = network(filled, 16 / 60)[0, :, :HEIGHT, :WIDTH].clamp(0, 1)
    assert np.abs(made[1] - 255 * between.permute(1, 2, 0).numpy()).max() <= 1
    [cost] = finish_costs(make_request(ASKED), VideoShape(3, HEIGHT, WIDTH), here, 1e12, 4)
    assert 0.85 <= (ledger.peak_bytes - cost.weights_bytes) / cost.activations_bytes <= 1
    backwarp_tenGrid.clear()
    list(interpolated_by(file, raw, 24, Device.pick("cpu"), lambda *_: None))
    assert not backwarp_tenGrid, "its grids stay on the device"


def test_files_that_are_not_its_are_refused_by_name(root):
    torch.save({"module.encode.cnn0.weight": torch.zeros(16, 3, 3, 3)}, root / "other.pkl")
    with pytest.raises(FileError, match="other"):
        open_interpolator(root / "other.pkl")
    (root / "bad.pkl").write_bytes(b"x" * 100)
    with pytest.raises(FileError, match="bad"):
        open_interpolator(root / "bad.pkl")


def test_one_that_is_not_here_says_where_it_belongs(tmp_path):
    request = make_request(ASKED)
    with pytest.raises(FileError, match="interpolators"):
        finish_costs(request, request.shape, inventory((tmp_path,)), 1e12, 4)
