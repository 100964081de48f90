"""The WandB workspace is saved by the real package, in a process of its own, to a server on loopback."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from torchtune_agent.metrics.workspace import workspace

_VIEWER = {"id": "1", "username": "me", "entity": "us", "email": "me@here", "flags": "{}", "teams": {"edges": []}}
_ANSWER = {"viewer": _VIEWER, "upsertView": {"view": {"id": "2", "name": "abc"}, "inserted": True}}


class Service(ThreadingHTTPServer):
    """Answers WandB's client, and keeps what it was asked to save."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.saved: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Service  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "upsertView" in query["query"]:
            self.server.saved.append(query["variables"])
        body = json.dumps({"data": _ANSWER}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    server = Service()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def _run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchtune_agent", "wandb-workspace", *arguments]
    env = {**os.environ, "WANDB_ERROR_REPORTING": "false", **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_it_is_saved_in_the_project(service: Service) -> None:
    url = f"http://127.0.0.1:{service.server_port}"
    done = _run("--project", "agents", WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{url}/us/agents?nw=abc"
    (view,) = service.saved
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("us", "agents", "Token classes")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    panels = {(s["name"], p["config"]["chartTitle"]): p["config"] for s in sections for p in s["panels"]}
    loss = panels["Token classes, validation", "Loss"]
    assert loss["xAxis"] == "global_step"
    assert {"val_reasoning_nll", "val_tool_call_nll", "val_arg_value_nll"} <= set(loss["metrics"])
    assert panels["Run", "Loss of all trained tokens"]["metrics"] == ["loss", "val_loss"]


def test_its_names_are_those_of_the_runs() -> None:
    pytest.importorskip("wandb_workspaces")
    sections = workspace("p", "e", "slash").sections
    assert "train/call_name/accuracy" in [name for panel in sections[1].panels for name in panel.y]


def test_without_a_login_it_says_what_to_do(tmp_path: Any) -> None:
    done = _run("--project", "p", WANDB_API_KEY="", HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "wandb login" in done.stderr and "Traceback" not in done.stderr
