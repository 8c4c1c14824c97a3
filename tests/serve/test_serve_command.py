"""`trigflow serve` from its command line."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import programs
from conftest import Result
from deploy.students import NAMES
from serve.helpers import StubDrawer, stub_offer, student, teacher, wait_for
from trigflow.conditions import Conditioner
from trigflow.runtime.errors import UserError
from trigflow.serve.app import create_app
from trigflow.serve.drawing import draw_together
from trigflow.serve.limits import Limits
from trigflow.serve.listen import bind, read_token, said_after, settled_heap, show, use_cores
from trigflow.serve.noise import NoiseSource
from trigflow.serve.offers import offers_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a student with its teacher below it."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    student().save(folder)
    teacher().save(folder / "teacher")
    return folder


def test_a_run_offers_its_teacher(run: Path, tmp_path: Path) -> None:
    assert [offer.name for offer in offers_of(run, Limits(), "cpu", "plain")] == ["student", "teacher"]
    assert [offer.name for offer in offers_of(run / "teacher", Limits(), "cpu", "plain")] == ["teacher"]
    student().save(tmp_path / "alone")
    assert [offer.name for offer in offers_of(tmp_path / "alone", Limits(), "cpu", "plain")] == ["student"]


@pytest.mark.parametrize(
    ("mine", "theirs", "served"),
    [
        (NAMES, NAMES, True),
        (NAMES, (), True),
        ((), NAMES, True),
        (NAMES, tuple(map(str, range(10))), True),
        (NAMES, NAMES[::-1], False),
        (NAMES, (*NAMES[:9], "ten"), False),
    ],
)
def test_a_teacher_of_other_classes_is_not_served_as_that_of_the_student(
    mine: tuple[str, ...], theirs: tuple[str, ...], served: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, names, folder in ((student(), mine, tmp_path), (teacher(), theirs, tmp_path / "teacher")):
        dataclasses.replace(model, conditioner=Conditioner.of_classes(10, names)).save(folder)
    offers = offers_of(tmp_path, Limits(batch=1), "cpu", "plain")
    assert [offer.name for offer in offers] == ["student", "teacher"][: 1 + served]
    assert ("is not served" in capsys.readouterr().err) != served


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", 2.5), ("images", True), ("steps", "8"), ("queue_seconds", float("inf")), ("guidance", None), ("batch", -1)],
)
def test_limits_from_python_are_checked_too(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^limit {name} = .*; expected a (whole|finite) number above 0; correct --limits"):
        Limits(**{name: value})
    assert Limits(window_ms=0, guidance=4).window_ms == 0
    assert Limits(images=10**400).images == 10**400


@pytest.mark.parametrize("token", ["", "short", "sixteen letters and a space", "x" * 257])
def test_tokens_from_python_are_checked_too(token: str) -> None:
    with pytest.raises(UserError, match=r"^the token cannot be used; expected 16 to 256 letters"):
        create_app([stub_offer(StubDrawer())], token=token)


def test_what_is_served_has_names_of_its_own() -> None:
    with pytest.raises(UserError, match=r"^none to serve; expected a student, a teacher, or one of each"):
        create_app([])
    with pytest.raises(UserError, match=r"^student, student to serve; expected"):
        create_app([stub_offer(StubDrawer())] * 2)


def test_serves_until_interrupted(run: Path, tmp_path: Path) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f"#!/bin/sh\nprintf %s \"$1\" > '{opened}.part' && mv '{opened}.part' '{opened}'\n")
    browser.chmod(0o755)
    command = ["-m", "trigflow", "serve", run, "--port", "0", "--device", "cpu", "--variant", "plain", "--open"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIGFLOW_TOKEN": "a-token.of_enough~letters", "BROWSER": str(browser)}
    server = programs.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, environment=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("student and teacher at http://127.0.0.1:"), line
        address = line.split()[4].rstrip(",")
        with urllib.request.urlopen(f"{address}/healthz", timeout=10) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/v1/model", timeout=10)
        wait_for(opened.exists)
        assert opened.read_text() == f"{address}/"
    finally:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert out == "closed\n"
    assert not err or (err.startswith("getting ") and err.count("\n") == 1), "on a slow machine, what it is doing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--port", "-1"), "cannot listen"),
        (("--port", "70000"), "cannot listen"),
        (("--host", "203.0.113.7"), "cannot listen"),
        (("--host", "two..dots"), "cannot listen"),
        (("--token-file", "missing"), "cannot be read"),
        (("--limits.images", "0"), "limit images = 0"),
        (("--limits.guidance", "nan"), "limit guidance = nan"),
        (("--device", "abacus"), "device 'abacus'"),
        (("--variant", "abacus"), "variant"),
        (("--origins", "https://example.org", "example.org"), "origin 'example.org'; expected scheme and host"),
        (("--origins", "*"), "origin '*'; expected scheme and host"),
    ],
)
def test_bad_options(cli: Callable[..., Result], run: Path, options: tuple[str, ...], message: str) -> None:
    result = cli("serve", run, *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_a_folder_that_is_no_run(cli: Callable[..., Result], tmp_path: Path) -> None:
    result = cli("serve", tmp_path)
    assert result.code == 2
    assert "model.json" in result.err


def test_without_the_extra(cli: Callable[..., Result], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "uvicorn" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = cli("serve", run)
    assert result.code == 2
    assert 'pip install "trigflow[serve]"' in result.err


def test_offers_are_settled(run: Path) -> None:
    """Every batch that a request can lead to is made of what was recorded before the first."""
    offers = offers_of(run, Limits(batch=4), "cpu", "traced")
    for offer in offers:
        network = offer.drawers[0].model.network  # type: ignore[attr-defined]
        recorded = set(network.recorded)
        assert {key[0] for key in recorded} == {1, 2, 4}
        guidance = offer.guidance[1]
        for labels in (None, 3, {"1": 1.0, "2": 1.0, "3": 1.0}):
            order = offer.order(count=4, labels=labels, guidance=guidance, steps=1, walk=(1.0, 2.0))
            assert draw_together(offer.drawers[0], NoiseSource(offer.model), [order])[0].shape == (4, 1, 8, 8)
        assert set(network.recorded) == recorded


@pytest.mark.parametrize(
    ("address", "opened"),
    [("http://0.0.0.0:81/", "http://127.0.0.1:81/"), ("http://[::]:81/", "http://[::1]:81/"), ("http://a:1/", "http://a:1/")],
)
def test_where_there_is_no_browser_the_address_is_said(
    address: str, opened: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(asked.append(url)))
    show(address)
    assert asked == [opened]
    assert opened in capsys.readouterr().err


def test_what_takes_long_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with said_after(0.01, "patience"):
        time.sleep(0.2)
    with said_after(60, "not this"):
        pass
    assert capsys.readouterr() == ("", "patience\n")


def test_what_was_made_before_is_no_garbage() -> None:
    before = gc.get_freeze_count()
    with settled_heap():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as conftest.py has it, for the tests after this one


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIGFLOW_TOKEN", raising=False)
    assert read_token(None) is None
    file = tmp_path / "token"
    file.write_text("a-token.of_enough~letters\n")
    assert read_token(file) == "a-token.of_enough~letters"
    for bad in ("short", "with a space in its middle", "", "é" * 20, "x" * 257):
        file.write_text(bad)
        with pytest.raises(UserError, match="cannot be used"):
            read_token(file)
    monkeypatch.setenv("TRIGFLOW_TOKEN", "another-token-in-the-environment")
    assert read_token(None) == "another-token-in-the-environment"
    monkeypatch.setenv("TRIGFLOW_TOKEN", "")
    with pytest.raises(UserError, match="TRIGFLOW_TOKEN"):
        read_token(None)


def test_cores_are_divided_among_workers() -> None:
    cpu, before = torch.device("cpu"), torch.get_num_threads()
    try:
        for cores, workers, threads, expected in (
            (1, None, None, (1, 1)),
            (2, None, None, (2, 1)),
            (9, None, None, (2, 4)),
            (2, 3, None, (3, 1)),
            (8, 1, None, (1, 8)),
            (8, None, 3, (2, 3)),
        ):
            torch.set_num_threads(cores)
            assert (use_cores(cpu, workers, threads), torch.get_num_threads()) == expected
        torch.set_num_threads(2)
        assert (use_cores(torch.device("cuda"), None, None), torch.get_num_threads()) == (1, 2)
        with pytest.raises(UserError, match="0 threads; expected at least 1; change --threads"):
            use_cores(cpu, None, 0)
        with pytest.raises(UserError, match="-1 workers; expected at least 1; change --workers"):
            use_cores(cpu, -1, None)
    finally:
        torch.set_num_threads(before)


def test_workers_draw_the_same_with_buffers_of_their_own(run: Path) -> None:
    offer = offers_of(run, Limits(batch=4), "cpu", "traced", workers=2)[0]
    first, second = offer.drawers
    assert first.model.network is not second.model.network  # type: ignore[attr-defined]
    order = offer.order(count=3)
    a, b = (draw_together(drawer, NoiseSource(offer.model), [order])[0] for drawer in (first, second))
    assert torch.equal(a, b)
    assert a.float().std() > 0
