"""Processes on several nodes are told to talk by their nodes' addresses."""

from __future__ import annotations

import os

import pytest
import ray

from app.workers.network import interfaces, network_variables, use_node_address

MACHINE = {"lo": ("127.0.0.1", "::1"), "eth0": ("192.168.1.7",), "ib0": ("10.0.0.7", "fd00::7")}


@pytest.mark.parametrize(("address", "interface"), [("10.0.0.7", "ib0"), ("192.168.1.7", "eth0"), ("fd00::7", "ib0"), ("127.0.0.1", "lo")])
def test_gloo_is_given_the_interface_of_the_nodes_address(address: str, interface: str) -> None:
    assert network_variables(address, MACHINE) == {"GLOO_SOCKET_IFNAME": interface, "VLLM_HOST_IP": address}


def test_an_address_of_no_interface_leaves_gloo_its_own_choice() -> None:
    assert network_variables("203.0.113.7", MACHINE) == {"VLLM_HOST_IP": "203.0.113.7"}


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    (loopback, *_) = [name for name, addresses in interfaces().items() if "127.0.0.1" in addresses]
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(os, "environ", {"VLLM_HOST_IP": "10.9.9.9"})
    use_node_address()
    assert os.environ == {"VLLM_HOST_IP": "10.9.9.9", "GLOO_SOCKET_IFNAME": loopback}
