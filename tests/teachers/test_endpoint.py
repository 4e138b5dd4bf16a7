"""An endpoint's settings hold no secret, and waits grow."""

from __future__ import annotations

import dataclasses
import time
from email.utils import formatdate

import pytest
import yaml
from jsonargparse import ArgumentParser

from limbeck.errors import UserError
from limbeck.teachers.endpoint import Client, Endpoint, Unanswered
from tests.teachers.http_server import ModelServer

SECRET = "sk-live-0123456789abcdef"


def test_an_endpoint_is_built_from_yaml_and_written_to_it():
    parser = ArgumentParser()
    parser.add_argument("--endpoint", type=Endpoint)
    text = "{url: 'http://localhost:8000/v1', model: m, dialect: vllm, extra: {top_k: 5}, budget_tokens: 100}"
    endpoint = parser.instantiate(parser.parse_args(["--endpoint", text])).endpoint
    assert endpoint == Endpoint("http://localhost:8000/v1", "m", dialect="vllm", extra={"top_k": 5}, budget_tokens=100)
    assert Endpoint(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(endpoint)))) == endpoint


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"url": f"https://user:{SECRET}@host/v1"}, "without user name, password or query"),
        ({"url": f"https://host/v1?key={SECRET}"}, "without user name, password or query"),
        ({"url": "host:8000/v1"}, "an endpoint's url is http"),
        ({"key_variable": SECRET}, "never the key itself"),
        ({"dialect": "tgi"}, "dialect is 'tgi'"),
        ({"attempts": 0}, "attempts is 0"),
        ({"price_in": -1}, "price_in is -1"),
        ({"budget_cost": 1.0}, "give price_in and price_out"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_repeating_a_key(settings, message):
    with pytest.raises(UserError, match=message) as error:
        Endpoint(**{"url": "http://localhost/v1", "model": "m", **settings})
    assert SECRET not in str(error.value)


def test_unknown_and_missing_settings_are_named():
    with pytest.raises(UserError, match="no setting 'timout' .did you mean timeout"):
        Endpoint.of({"url": "http://localhost/v1", "model": "m", "timout": 3})
    with pytest.raises(UserError, match="an endpoint needs its model"):
        Endpoint.of({"url": "http://localhost/v1"})


def test_waits_double_within_their_jitter_up_to_the_longest():
    endpoint = Endpoint("http://localhost/v1", "m", backoff=1.0, longest_wait=5.0)
    for attempt, full in ((2, 1), (3, 2), (4, 4), (5, 5), (60, 5)):
        waits = [endpoint.wait_before(attempt) for _ in range(50)]
        assert full / 2 <= min(waits) < max(waits) <= full


def test_money_is_counted_by_the_million():
    assert Endpoint("http://localhost/v1", "m", price_in=3, price_out=15).cost(2_000_000, 100_000) == pytest.approx(7.5)


@pytest.mark.parametrize("header, least, most", [("2", 2, 2), ("0", 0, 0), ("soon", None, None), ("date", 15, 31)])
def test_retry_after_gives_seconds_or_a_date(header, least, most):
    header = formatdate(time.time() + 30, usegmt=True) if header == "date" else header
    with ModelServer(status=503, retry_after=header) as server, pytest.raises(Unanswered, match="503 told to") as error:
        Client(Endpoint(server.url, "m")).post("completions", b"{}")
    wait = error.value.wait
    assert wait is None if least is None else least <= wait <= most
