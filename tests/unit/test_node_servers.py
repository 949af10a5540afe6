"""How the servers of a node are started and where the other nodes find them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from siren_megatron.config import Config
from siren_megatron.rollout import node_servers
from siren_megatron.rollout.hosts import Hosts, node_address
from siren_megatron.rollout.node_servers import NodeServers, server_options
from siren_megatron.rollout.server import RolloutError, RolloutServer, choose_port


@pytest.fixture
def config(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 7}))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return Config.of(hf_checkpoint=tmp_path, prompt_data=tmp_path, save=tmp_path, rollout_num_servers=2)


def test_each_server_has_its_own_log_and_an_address_that_others_reach(config, monkeypatch):
    one = dataclasses.replace(config.rollout, rollout_num_servers=1)
    (alone,) = server_options(dataclasses.replace(config, rollout=one), Hosts(), on_cpu=True)
    assert (alone.log_file.name, alone.host) == ("vllm.log", "127.0.0.1")
    both = server_options(config, Hosts(), on_cpu=True)
    assert [options.log_file.name for options in both] == ["vllm-0-0.log", "vllm-0-1.log"]
    assert {options.host for options in both} == {"127.0.0.1"}, "nobody else has to reach them"
    monkeypatch.setattr(node_servers, "node_address", lambda: "10.0.0.7")
    second_node = server_options(config, Hosts((0, 4), 1), on_cpu=True)
    assert [(o.log_file.name, o.host) for o in second_node] == [
        ("vllm-1-0.log", "10.0.0.7"),
        ("vllm-1-1.log", "10.0.0.7"),
    ]


def test_the_address_of_a_node_is_the_one_on_the_way_to_the_rendezvous(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert node_address() == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    with pytest.raises(ValueError, match="the rendezvous at no such host:29500 cannot be reached"):
        node_address()


@pytest.mark.parametrize(
    ("listens_on", "here", "elsewhere"),
    [
        ("10.0.0.7", "http://10.0.0.7:81", "http://10.0.0.7:81"),
        ("0.0.0.0", "http://127.0.0.1:81", "http://n2:81"),
    ],
)
def test_what_another_node_needs_to_ask_a_server(config, tmp_path, listens_on, here, elsewhere):
    options = dataclasses.replace(server_options(config, Hosts(), on_cpu=True)[0], host=listens_on)
    server = RolloutServer(options, None, 81, "name", "key", tmp_path, (), 0)
    remote = server.remote("n2")
    assert (server.url, remote.url) == (here, elsewhere)
    assert (remote.name, remote.api_key, remote.vocab_size, remote.options) == ("name", "key", 7, options)
    assert remote.alive() and "vllm-0-0.log" in remote.describe_death()


def test_ports_of_servers_that_start_side_by_side_differ():
    every_port_but_one = set(range(20000, 32000)) - {choose_port("127.0.0.1")}
    assert choose_port("127.0.0.1", every_port_but_one) not in every_port_but_one


def test_a_start_that_fails_ends_those_before_it(config, monkeypatch):
    events = []

    class Server:
        port = 20001

        def stop(self):
            events.append("stop")

        @classmethod
        def start(cls, options, taken):
            events.append(f"start {options.log_file.name} {taken}")
            if taken:
                raise RolloutError("no more")
            return cls()

    monkeypatch.setattr(node_servers, "RolloutServer", Server)
    with pytest.raises(RolloutError, match="no more"):
        NodeServers(server_options(config, Hosts(), on_cpu=True), 20.0)
    assert events == ["start vllm-0-0.log []", "start vllm-0-1.log [20001]", "stop"]
