"""Which attention runs where a kernel did not prove itself: the next plainer kind, said in the clip's record."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from turbodiff_kernels import backend

from turbodiff.models import attention as module
from turbodiff.models.attention import _order_of_backends, attention, resolve_attention

CARD, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def failing(monkeypatch):
    """Says which kernels fail their check on the card."""
    monkeypatch.delenv("TURBODIFF_KERNELS", raising=False)
    bad: set[str] = set()
    chosen = lambda op, device: backend.Implementation(op, "reference" if op in bad or device == CPU else "triton", "")  # noqa: E731
    monkeypatch.setattr(backend, "chosen", chosen)
    return bad


@pytest.mark.parametrize(
    ("asked", "bad", "ran"),
    [
        ("sagesla", set(), ("sagesla", "triton")),
        ("sagesla", {"sagesla"}, ("sla", "triton")),
        ("sagesla", {"sagesla", "sla"}, ("sla", "reference")),
        ("sla", {"sla"}, ("sla", "reference")),
        ("sage", {"sage"}, ("dense", "torch")),
        ("sage", {"sla"}, ("sage", "triton")),
        ("dense", set(), ("dense", "torch")),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(sorted(value)) or "none",
)
def test_a_kernel_that_failed_makes_room_for_the_next_plainer_kind(asked, bad, ran, failing):
    failing |= bad
    assert resolve_attention(asked, CARD) == ran


@pytest.mark.parametrize("kind", ["sage", "sla", "sagesla"])
def test_a_cpu_and_a_person_who_wants_references_get_those_of_what_was_asked(kind, failing, monkeypatch):
    assert resolve_attention(kind, CPU) == (kind, "reference")
    monkeypatch.setenv("TURBODIFF_KERNELS", "reference")
    failing |= {kind}
    assert resolve_attention(kind, CARD) == (kind, "reference")


@pytest.mark.parametrize(("device", "capability", "first"), [
    ("cuda", (9, 0), SDPBackend.CUDNN_ATTENTION), ("cuda", (8, 9), None), ("cuda", (12, 0), None), ("cpu", None, None),
])  # fmt: skip
def test_torchs_dense_attention_tries_cudnn_first_on_hopper_only(device, capability, first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with _order_of_backends(torch.device(device)):
        order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    usual = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
    assert order[0] == (first or usual[0]) != SDPBackend.ERROR
    assert len(order) == len(usual), "what cuDNN cannot do the others still do"


@pytest.mark.parametrize("copied", [1, 2 * 90 * 16, 1 << 22], ids=["head", "two heads", "all"])
@pytest.mark.parametrize("keys", [90, 33])
def test_heads_that_are_copied_on_a_cpu_change_no_bit(copied, keys, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 3, 16) for tokens in (90, keys, keys))
    bias = torch.randn(1, 1, 1, keys)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias).transpose(1, 2)
    monkeypatch.setattr(module, "COPIED_ELEMENTS", copied)
    with torch.no_grad():
        got = attention(q, k, v, bias)
    assert torch.equal(got, expected) and got.is_contiguous()
