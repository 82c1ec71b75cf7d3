"""The kinds of attention. No pydantic: the networks import it, and the benches run where only torch is installed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

AttentionKind = Literal["dense", "sage", "sla", "sagesla"]
SPARSE_ATTENTION = ("sla", "sagesla")
# a kind that computes the same without INT8: for a kernel that is not there, and for a run that ended in NaN
PLAINER_ATTENTION: Mapping[str, AttentionKind] = MappingProxyType({"sagesla": "sla", "sage": "dense"})
