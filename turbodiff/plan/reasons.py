"""Every reason a plan can give, as a key with the numbers it carries. The page words each key in zh and en.

Sizes are in bytes, times in seconds; a number may be None where it is unknown.
"""

from typing import Any

from turbodiff.spec.plan import Reason

REASON_KEYS: dict[str, tuple[str, ...]] = {
    # what decides
    "binding_phase": ("phase", "peak_bytes", "budget_bytes", "weights_bytes", "activations_bytes"),
    "wish_does_not_fit": ("need_bytes", "budget_bytes", "short_bytes", "phase"),
    "fewer_frames_will_not_help": ("phase", "peak_bytes", "peak_at_5_frames_bytes"),
    "fewer_steps_save_time_only": ("steps",),
    # what was settled or lowered, one per entry of `changes`
    "settled": ("field", "to"),
    "lowered": ("field", "from", "to"),
    "int8_below_40gb": ("total_bytes", "saved_bytes"),
    "int8_not_faster_here": ("device_name",),
    "only_int8_on_disk": ("model",),
    "outside_trained_size": ("model", "resolution", "trained"),
    # levers: nothing of the picture changes
    "text_streamed": ("saved_bytes", "seconds"),
    "text_on_cpu": ("saved_bytes", "seconds"),
    "experts_swapped": ("saved_bytes", "seconds"),
    "blocks_streamed": ("blocks_resident", "blocks", "saved_bytes", "slower"),
    "vae_tiled": ("saved_bytes", "seconds"),
    "ffn_chunked": ("chunks", "saved_bytes"),
    "lossless_is_slow": ("seconds", "seconds_chosen", "slower"),
    # the schedule
    "experts_by_step": ("experts",),
    "one_expert_runs": ("expert", "steps", "boundary"),
    # the machine
    "cpu_run": ("available_bytes",),
    "card_shared": ("others_bytes", "total_bytes"),
    "free_memory_unknown": ("total_bytes",),
    "free_memory_bogus": ("free_bytes", "used_bytes", "total_bytes"),
    "card_memory_unknown": ("assumed_bytes",),
    "unified_memory": ("available_bytes",),
    "host_memory_unknown": (),
    "host_memory_binds": ("need_bytes", "available_bytes", "phase"),
    "gpu_unavailable": ("state",),
    "torch_without_cuda": ("torch",),
    "conv3d_trap": ("torch", "cudnn"),
    "pretended": ("total_bytes",),
    "calibrated": ("factor", "samples"),
    "download": ("model", "bytes"),
}


def reason(key: str, **numbers: Any) -> Reason:
    """A reason with exactly the numbers its key carries."""
    assert set(numbers) == set(REASON_KEYS[key]), (key, sorted(numbers))
    return Reason(key=key, numbers=numbers)
