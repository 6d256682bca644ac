"""By which address processes on several nodes talk to each other: the one under which Ray knows their node.

Left to themselves, gloo takes the interface that the host's name resolves to, which on most machines is the loopback, where ranks on
several nodes never meet, and vLLM the one with a route to the internet.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence


def use_node_address() -> None:
    """Tell gloo and vLLM in this process, before they open anything; what the environment already says stays."""
    import ray

    for name, value in network_variables(ray.util.get_node_ip_address(), interfaces()).items():
        os.environ.setdefault(name, value)


def network_variables(address: str, there: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Environment variables for a node's address.

    there: the machine's interfaces and their addresses. Where none has the node's, as behind address translation, gloo chooses by itself.

    >>> network_variables("10.0.0.7", {"lo": ["127.0.0.1"], "eth1": ["10.0.0.7", "fe80::7"]})
    {'VLLM_HOST_IP': '10.0.0.7', 'GLOO_SOCKET_IFNAME': 'eth1'}
    """
    interface = next((name for name, addresses in there.items() if address in addresses), None)
    return {"VLLM_HOST_IP": address} | ({} if interface is None else {"GLOO_SOCKET_IFNAME": interface})


def interfaces() -> dict[str, tuple[str, ...]]:
    """Of this machine: name -> IPv4 and IPv6 addresses."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(address.address.partition("%")[0] for address in addresses if address.family in families)
        for name, addresses in psutil.net_if_addrs().items()
    }
