"""The phases behind the decode: frames in between, larger frames, planned by plan/finishing_costs.py.

Networks are other people's, and so is their maths: spandrel knows an upscaler from its tensors, ccvfi has RIFE's. The
tensors come from a file through our own readers; nothing that these packages may download is asked for. An upscaler
sees a tile at a time, so that memory does not grow with the picture; motion is found in whole frames.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbodiff.media.fingerprints import Bytes
from turbodiff.media.finishing import Progress, RawFrames, enlarged, frames_between, interpolated
from turbodiff.plan.finishing_costs import EVEN, MARGIN, TILE
from turbodiff.runtime import offload
from turbodiff.runtime.attempt import Attempt
from turbodiff.runtime.device import Device
from turbodiff.spec.errors import FileError, package_missing
from turbodiff.spec.events import ProgressEvent
from turbodiff.spec.models import Inventory, NetworkKind
from turbodiff.spec.numbers import GIB
from turbodiff.weights.folders import find_networks
from turbodiff.weights.load import tensors_of

MOST_NETWORK_BYTES = GIB  # the largest that spandrel 0.4 names, HAT-L, has 41 million parameters
TOLD_S = 0.5  # between two words of progress


def finished(attempt: Attempt, name: str, raw: RawFrames) -> tuple[Iterator[Bytes], int, int]:
    """The frames of the phase "interpolate" or "upscale", their rate, and their sides over those before."""
    request, told_s = attempt.request, [0.0]

    def progress(done: int, count: int) -> None:
        attempt.check_cancelled()
        if done == count or time.monotonic() - told_s[0] > TOLD_S:
            told_s[0] = time.monotonic()
            attempt.send(ProgressEvent(i=done, n=count))

    device, rate, times = attempt.models.device, request.smooth_fps, request.upscale
    if name == "interpolate" and request.interpolator:
        file = _file("interpolator", request.interpolator)
        return interpolated_by(file, raw, rate, device, progress), rate, 1
    if name == "interpolate":
        return interpolated(raw, rate, progress), rate, 1
    if request.upscaler:
        return enlarged_by(_file("upscaler", request.upscaler), raw, times, device, progress), raw.fps, times
    return enlarged(raw, times, progress), raw.fps, times


def _file(kind: NetworkKind, name: str) -> Path:
    """Where a network is now.

    Raises:
        FileError: it went since its job was accepted.
    """
    return Path(Inventory(networks=find_networks()).network(kind, name).path)


@torch.inference_mode()
def interpolated_by(file: Path, raw: RawFrames, wanted: int, device: Device, progress: Progress) -> Iterator[Bytes]:
    """The frames at the rate `wanted`, those in between by the network of a file, each uint8 [1, H, W, 3].

    Frames that fall on one of the clip's are that one; behind the last it is repeated, as ffmpeg's filter does here.

    Raises:
        FileError: the file is not of RIFE 4.26 heavy, or ccvfi is not installed.
    """
    network, number, frames = open_interpolator(file), 0, frames_between(raw.frames, raw.fps, wanted)
    fill = (0, -raw.width % EVEN, 0, -raw.height % EVEN)
    after = next(iter(raw))
    try:
        with offload.on_device(network, device.torch_device):
            for place, (before, after) in enumerate(pairwise(raw)):
                both = offload.to_device(torch.from_numpy(np.concatenate((before, after), 3)), device.torch_device)
                pair = F.pad(both.permute(0, 3, 1, 2).float() / 255, fill, mode="replicate")
                while number < frames and number * raw.fps < (place + 1) * wanted:
                    made = before
                    if part := number * raw.fps / wanted - place:
                        shown = network(pair, part)[:, :, : raw.height, : raw.width].clamp(0, 1) * 255
                        made = shown.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                    number += 1
                    progress(number, frames)
                    yield made
            for done in range(number + 1, frames + 1):
                progress(done, frames)
                yield after
    finally:
        _forget_grids()


def open_interpolator(file: Path) -> nn.Module:
    """RIFE's network (ECCV 2022, https://arxiv.org/abs/2011.06294) with the tensors of a file, float32 in host memory.

    Raises:
        FileError: as `interpolated_by`.
    """
    try:
        from ccvfi.arch import IFNet
    except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision of another torch raises the last two
        raise package_missing("interpolator", str(error)[:100]) from None
    with torch.device("meta"):
        network: nn.Module = IFNet()
    stored = {name.removeprefix("module."): value for name, value in tensors_of(file, MOST_NETWORK_BYTES).items()}
    own = network.state_dict()
    wrong = [name for name, value in own.items() if name not in stored or stored[name].shape != value.shape]
    if wrong:
        raise FileError(
            "this file is not of RIFE 4.26 heavy", code="interpolator_foreign", field="interpolator",
            got=f"{file.name}: {wrong[0]}", expected="RIFE_IFNet_v426_heavy.pkl",
            try_instead="another file, or leave the interpolator out",
        )  # fmt: skip
    network.load_state_dict({name: stored[name].float() for name in own}, assign=True)
    return network.requires_grad_(False).eval()


def _forget_grids() -> None:
    """Free what ccvfi keeps on the device for each size that it has seen, for as long as the process lives."""
    from ccvfi.arch.arch_utils.warplayer import backwarp_tenGrid

    backwarp_tenGrid.clear()


@torch.inference_mode()
def enlarged_by(file: Path, raw: RawFrames, times: int, device: Device, progress: Progress) -> Iterator[Bytes]:
    """The frames with their sides `times` as long, by the network of a file, each uint8 [1, times H, times W, 3].

    A network of another scale is followed by area averaging or by a bicubic filter.

    Raises:
        FileError: the file is none that spandrel knows, or spandrel is not installed.
    """
    network, scale, dtype = open_upscaler(file, device)
    with offload.on_device(network, device.torch_device):
        for number, frame in enumerate(raw, 1):
            picture = offload.to_device(torch.from_numpy(np.array(frame)), device.torch_device)
            picture = picture.permute(0, 3, 1, 2).to(dtype) / 255
            large = tiled(network, picture, scale).float()
            if scale != times:
                size = (raw.height * times, raw.width * times)
                how = "area" if scale > times else "bicubic"
                large = F.interpolate(large, size, mode=how)
            shown = (large.clamp(0, 1) * 255).round().to(torch.uint8)
            progress(number, raw.frames)
            yield shown.permute(0, 2, 3, 1).cpu().numpy()


def tiled(network: nn.Module, picture: Tensor, scale: int) -> Tensor:
    """`network` over a picture [1, 3, H, W], a tile at a time, each with a margin that is cut off."""
    _, _, height, width = picture.shape
    large = picture.new_empty(1, 3, height * scale, width * scale)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            bottom, right = min(top + TILE, height), min(left + TILE, width)
            above, before = min(MARGIN, top), min(MARGIN, left)
            part = picture[:, :, top - above : bottom + MARGIN, left - before : right + MARGIN]
            made = network(part)[:, :, above * scale :, before * scale :]
            rows, columns = (bottom - top) * scale, (right - left) * scale
            large[:, :, top * scale : bottom * scale, left * scale : right * scale] = made[:, :, :rows, :columns]
    return large


def open_upscaler(file: Path, device: Device) -> tuple[nn.Module, int, torch.dtype]:
    """The network of a file in host memory, its scale, and the dtype that it computes in on a device.

    Raises:
        FileError: as `enlarged_by`.
    """
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision of another torch raises the last two
        raise package_missing("upscaler", str(error)[:100]) from None
    try:
        found = ModelLoader("cpu").load_from_state_dict(tensors_of(file, MOST_NETWORK_BYTES))
    except FileError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a file of somebody else's may make of it
        raise _no_upscaler(file, type(error).__name__) from None
    if not isinstance(found, ImageModelDescriptor) or (found.input_channels, found.output_channels) != (3, 3):
        raise _no_upscaler(file, f"{found.architecture.name}, {found.purpose}")
    dtype = torch.float32
    if device.is_cuda and (found.supports_bfloat16 or found.supports_half):
        dtype = torch.bfloat16 if found.supports_bfloat16 else torch.float16
    network: nn.Module = found.model
    return network.to(dtype).requires_grad_(False).eval(), found.scale, dtype


def _no_upscaler(file: Path, got: str) -> FileError:
    return FileError(
        "this file is no upscaler of RGB pictures", code="upscaler_foreign", field="upscaler",
        got=f"{file.name}: {got}",
        expected="a network that spandrel knows: ESRGAN, Real-ESRGAN, SwinIR, DAT, ...",
        try_instead="another file, or leave the upscaler out",
    )  # fmt: skip
