"""Numbers as people read them: GiB, GB, seconds."""

GIB = 1 << 30
MIB = 1 << 20
GB = 10**9


def gib(n_bytes: float) -> str:
    """Bytes as "11.2 GiB", small ones as MiB or KiB."""
    if 0 < n_bytes < MIB:
        return f"{max(1, round(n_bytes / 1024))} KiB"
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB / 10 else f"{n_bytes / MIB:.0f} MiB"


def gb(n_bytes: float) -> str:
    """Bytes as "14.5 GB", as hubs and disks count them."""
    return f"{n_bytes / GB:.1f} GB"


def seconds(value_s: float) -> str:
    """Seconds as "0.4 s", "41 s" or "3 min 20 s"."""
    if value_s < 10:
        return f"{value_s:.1f} s"
    if value_s < 120:
        return f"{value_s:.0f} s"
    return f"{int(value_s // 60)} min {int(value_s % 60)} s"
