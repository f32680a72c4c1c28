"""The optional loggers with their real packages, where these are installed."""

from __future__ import annotations

import json

import pytest

from pipeline.config import LoggerConfig
from pipeline.loggers import JsonlLogger, open_loggers

ROWS = [{"step": 5, "fvu": 0.5, "note": "text"}, {"step": 10, "fvu": 0.25, "l0": 32.0}]


def log(config, folder, rows, resume_step=0, name=""):
    for logger in open_loggers(config, folder, {"sae": {"k": 4}}, resume_step, name):
        for row in rows:
            logger.log(row)
        logger.close()


def test_rows_before_a_resume_are_on_disk_from_its_start_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step, rows in ((0, ROWS), (5, [])):
        logger = JsonlLogger(path, step)
        for row in rows:
            logger.log(row)
        if rows:
            logger.file.write('{"step": 1')  # a kill
            logger.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS[:1]  # the second is not closed: killed
    logger.log(ROWS[1])
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    logger.close()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_gets_the_numbers_in_a_database_of_the_run_and_goes_on_in_the_same_run(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    config = LoggerConfig(mlflow=True, project="toy")
    log(config, tmp_path, ROWS)
    log(config, tmp_path, [{"step": 15, "fvu": 0.125}], resume_step=10)
    log(config, tmp_path, ROWS[:1], name="k4")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("toy")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {tmp_path.name, f"{tmp_path.name}-k4"}
    run = runs[tmp_path.name]
    history = client.get_metric_history(run.info.run_id, "fvu")
    assert [(m.step, m.value) for m in history] == [(5, 0.5), (10, 0.25), (15, 0.125)]
    assert run.data.metrics["l0"] == 32.0
    assert run.data.params == {"sae.k": "4"}
    assert (run.info.status, "note" in run.data.metrics) == ("FINISHED", False)


@pytest.mark.filterwarnings("ignore")
def test_trackio_gets_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    log(LoggerConfig(trackio=True, project="toy"), tmp_path, ROWS)
    import sqlite3

    (database,) = (tmp_path / "trackio").glob("toy*.db")
    with sqlite3.connect(database) as found:
        rows = found.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)["fvu"]) for step, metrics in rows] == [(5, 0.5), (10, 0.25)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_the_numbers_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb")
    log(LoggerConfig(wandb=True, project="toy"), tmp_path, ROWS)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    data = file.read_bytes()
    assert b"fvu" in data
    assert b"0.25" in data


def test_several_saes_have_a_file_each(tmp_path):
    log(LoggerConfig(), tmp_path, ROWS, name="k4")
    log(LoggerConfig(), tmp_path, ROWS[:1], name="k8")
    found = {p.parent.name: len(p.read_text().splitlines()) for p in tmp_path.glob("*/metrics.jsonl")}
    assert found == {"k4": 2, "k8": 1}
