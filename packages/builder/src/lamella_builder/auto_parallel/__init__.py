"""Choosing how many tensor, pipeline and expert ranks a model gets: a cost model, no measurement.

`choose_mapping` is a pure function of a model's configuration, a `Workload` and `DeviceFacts`; `device_facts` reads the
latter from this machine.
"""

from __future__ import annotations

from lamella_builder.auto_parallel.choose import Candidate, Choice, choose_mapping
from lamella_builder.auto_parallel.cost import Workload
from lamella_builder.auto_parallel.facts import DeviceFacts, device_facts

__all__ = ["Candidate", "Choice", "DeviceFacts", "Workload", "choose_mapping", "device_facts"]
