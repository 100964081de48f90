"""Secrets of the config and the environment are in nothing that a run writes or prints."""

import re
from pathlib import Path

from tests import tune

IN_ENVIRONMENT = {"WANDB_API_KEY": "canary0env0wandb0" + "0" * 23, "HF_TOKEN": "canary-env-hub-token"}
IN_CONFIG = {"api_token": "canary-config-token", "url": "https://user:canary-url-password@example.org/data"}
CANARY = re.compile(rb"canary[-0][a-z]+[-0][a-z]+")


def test_no_canary_in_any_file_or_line(tmp_path: Path) -> None:
    assert all(CANARY.search(text.encode()) for text in [*IN_ENVIRONMENT.values(), *IN_CONFIG.values()])
    logger = ("metric_logger=torchtune.training.metric_logging.WandBLogger", f"metric_logger.log_dir={tmp_path}")
    secrets = [f"dataset.{key}={value}" for key, value in IN_CONFIG.items()]
    result = tune.train(
        *tune.SMALL, *tune.FAULTY, *logger, *secrets, "log_by=[tool,source]", "log_sample_losses=True",
        processes=1, cwd=tmp_path,
        env={**tune.FAULTY_ENV, **IN_ENVIRONMENT, "WANDB_MODE": "offline"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "config.yaml", "report.html", "torchtune_config.yaml"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    assert [str(path) for path in written if CANARY.search(path.read_bytes())] == []
    assert CANARY.search((result.stdout + result.stderr).encode()) is None
    assert "api_token: '***'" in (tmp_path / "out" / "logs" / "config.yaml").read_text()
