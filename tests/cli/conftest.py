import logging
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner


@pytest.fixture
def invoke(monkeypatch):
    """Run in this process. Its settings of logging end with the test."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    log, loud = logging.getLogger("hermes"), logging.getLogger("transformers.modeling_utils")
    chatter = logging.getLogger("transformers")  # an earlier test may have imported it with its voice
    before = log.handlers, log.level, log.propagate, loud.level, chatter.level
    chatter.setLevel(logging.ERROR)

    def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        from hermes.cli.app import app

        result = CliRunner().invoke(app, ["run", *map(str, arguments)], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

    yield run
    log.handlers, log.level, log.propagate, loud.level, chatter.level = before
