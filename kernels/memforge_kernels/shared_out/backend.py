"""gloo whose groups do one thing after another."""

import os
from typing import Any

from torch.distributed import Backend, ProcessGroupGloo

NAME = "serial_gloo"


def gloo() -> str:
    """The backend to make groups of ranks on CPUs with: gloo with one thread for each group, where torch has two.

    Each thread notes what it has done last in a string of the group, without a lock. The name of a functional
    all-gather is too long to be kept in place, so that two which end at once free the one before twice, and the process
    dies of a damaged heap some time later (torch 2.13, ProcessGroupGloo::runLoop). Eight all-gathers of three numbers
    at once, over and over between two ranks on two busy cores: two runs of three died within half a minute, and none of
    six with one thread.
    """
    if NAME not in Backend.backend_list:
        Backend.register_backend(NAME, _made, extended_api=True, devices=["cpu"])
    return NAME


def _made(given: Any, _: Any) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()
    options._timeout, options._threads = given.timeout, 1
    # The interfaces and what is told of the group are those of torch's own gloo.
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    options._devices = [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",") if name]
    options._devices = options._devices or [ProcessGroupGloo.create_default_device()]
    options.global_ranks_in_group, options.group_name = given.global_ranks_in_group, given.group_id
    made = ProcessGroupGloo(given.store, given.group_rank, given.group_size, options)
    made._set_sequence_number_for_group()
    return made
