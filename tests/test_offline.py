"""Without a network nobody waits: neither for what was downloaded before nor for a name that was mistyped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from trimllm import offline
from trimllm.checkpoints import loading
from trimllm.checkpoints.origin import Origin
from trimllm.errors import InputError
from trimllm.run import licences
from trimllm.tasks.hub import read_hub
from trimllm.tasks.spec import Source


class Network:
    """What a client sees: a Hub that answers, or none."""

    answers = False

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []

    def head(self, url: str, *, timeout: float) -> None:
        self.asked.append((url, timeout))
        if not self.answers:
            raise ConnectionError("Name or service not known")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(offline, "get_session", lambda: made)
    monkeypatch.setattr(offline, "_known", (float("-inf"), True))
    return made


def test_without_a_network_no_file_is_waited_for(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def retried(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was asked for, with its retries")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", retried)
    for _ in range(2):
        with pytest.raises(InputError, match="no such folder, nor is it in the cache of the hub, out of reach"):
            loading.load_model("modls/llama")
    assert network.asked == [(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)], "asked once"
    assert not constants.is_offline_mode(), "as it was before"


def test_a_data_set_and_what_a_card_wants_are_not_waited_for(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited for another try"))
    with pytest.raises(InputError, match="cannot load split 'train' of nobody/nothing from the Hub"):
        read_hub(Source(hub="nobody/nothing"), "train", "mine")
    assert licences.card_of(Origin("modls/llama")) is None
    assert len(network.asked) == 1


def test_the_hub_is_asked_again_when_the_network_may_be_back(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    with offline.hub_or_cache():
        assert constants.is_offline_mode()
    network.answers = True
    monkeypatch.setattr(offline, "AGAIN", 0.0)
    with offline.hub_or_cache():
        assert not constants.is_offline_mode()


def test_a_hub_that_answers_is_not_asked_before_every_file(network: Network) -> None:
    network.answers = True
    for _ in range(3):
        with offline.hub_or_cache("owner/model"):
            assert not constants.is_offline_mode()
    assert len(network.asked) == 1


def test_what_is_on_this_machine_is_no_reason_to_ask(network: Network, tmp_path: Path) -> None:
    with offline.hub_or_cache(str(tmp_path)):
        pass
    assert not network.asked


def test_who_works_offline_is_left_alone(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with offline.hub_or_cache("modls/llama"):
        pass
    assert not network.asked
    assert constants.is_offline_mode()


@pytest.mark.parametrize("name", ["./not_there", "/not/there", "~/not_there", "not/there/either"])
def test_what_can_only_be_a_path_is_no_reason_to_ask(network: Network, name: str) -> None:
    with offline.hub_or_cache(name):
        pass
    assert not network.asked


def test_a_setting_of_a_model_is_no_connection():
    setting = ValueError("apply_residual_connection_post_layernorm must be a bool, not 3")
    assert loading.explain("m", setting) == f"cannot load model 'm': {setting}"
    for said in (
        "Connection refused",
        "HTTPSConnectionPool: max retries",
        "We couldn't connect to the Hub",
        "offline mode",
    ):
        assert loading.explain("m", OSError(said)).endswith("nor is it in the cache of the hub, out of reach now")
