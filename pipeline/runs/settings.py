"""Environment variables: every one that this project reads or sets, in one table. docs/environment.md is made of it."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variable:
    """One variable of the environment.

    kind     how its text is read
    default  None: unset. In the groups "ray" and "mlflow", what is set for the library where the user has set nothing
    """

    name: str
    group: Literal["ours", "cluster", "training", "ray", "mlflow"]
    kind: Literal["text", "flag", "number", "path", "url", "json"]
    default: str | None
    purpose: str


_ALL = (
    Variable(
        "REFINEDET_SUBMITTED_AT", "ours", "number", None, "when a job was submitted, s since 1970; `submit` sets it"
    ),
    Variable("REFINEDET_FAULT", "ours", "text", None, "drills: MODULE:FUNCTION ARGUMENTS that breaks the loss"),
    Variable("RAY_ADDRESS", "cluster", "text", None, "cluster that `launch` joins, where --address is absent"),
    Variable(
        "RAY_API_SERVER_ADDRESS", "cluster", "url", "http://127.0.0.1:8265", "dashboard of `submit`, `status`, `stop`"
    ),
    Variable("RAY_AUTH_MODE", "cluster", "text", None, "`token`: requests carry RAY_AUTH_TOKEN"),
    Variable("RAY_AUTH_TOKEN", "cluster", "text", None, "token of a cluster; a local node's is drawn at the launch"),
    Variable("REQUESTS_CA_BUNDLE", "cluster", "path", None, "authorities that may sign for an https:// dashboard"),
    Variable("RAY_JOB_HEADERS", "cluster", "json", None, "further HTTP headers, for a proxy that requires a login"),
    Variable("RAY_JOB_STOP_SIGNAL", "cluster", "text", None, "signal on which a submitted job saves; `submit` sets it"),
    Variable(
        "RAY_JOB_STOP_WAIT_TIME_S", "cluster", "number", None, "time for that; `submit` sets it, Ray's own is 3 s"
    ),
    Variable("PYTHONUNBUFFERED", "cluster", "flag", None, "lines of a submitted job come at once; `submit` sets it"),
    Variable("RANK", "training", "number", None, "number of this worker; torchrun and Ray Train set it"),
    Variable("WORLD_SIZE", "training", "number", None, "number of workers; torchrun and Ray Train set it"),
    Variable("LOCAL_RANK", "training", "number", "0", "number of this worker on its node, which chooses its GPU"),
    Variable("LOCAL_WORLD_SIZE", "training", "number", None, "workers on this node, which share its cores"),
    Variable("OMP_NUM_THREADS", "training", "number", None, "threads of a worker; default: an equal share of cores"),
    Variable("DS_ACCELERATOR", "training", "text", None, "DeepSpeed's device; set to `cpu` where training has no GPU"),
    Variable("CUBLAS_WORKSPACE_CONFIG", "training", "text", None, "set to `:4096:8` by `training.deterministic`"),
    Variable("RAY_USAGE_STATS_ENABLED", "ray", "flag", "0", "nothing about a run leaves the machine"),
    Variable("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "ray", "flag", "0", "hide GPUs from workers that asked for none"),
    Variable("RAY_CHDIR_TO_TRIAL_DIR", "ray", "flag", "0", "relative paths of the spec keep their meaning"),
    Variable("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "ray", "number", "0.5", "poll of workers; each end waits for one"),
    Variable("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "ray", "number", "2", "poll for nodes about to be taken away"),
    Variable(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "ray", "number", "30", "then the number of workers is decided anew"
    ),
    Variable("RAY_raylet_start_wait_time_s", "ray", "number", "120", "time for a node to start; Ray's own is 30 s"),
    Variable("RAY_health_check_initial_delay_ms", "cluster", "number", None, "drills: check nodes from their start"),
    Variable("RAY_health_check_period_ms", "cluster", "number", None, "drills: a dead node is seen in 5 s"),
    # A step on a CPU allocates the same gigabytes again and again; given back to the system, they cost a fifth of it.
    Variable("MALLOC_MMAP_MAX_", "ray", "number", "0", "glibc keeps large blocks; saves 180,000 page faults a step"),
    Variable("MALLOC_TRIM_THRESHOLD_", "ray", "number", str(2**34), "bytes free before glibc gives memory back"),
    Variable("MLFLOW_TRACKING_URI", "mlflow", "url", None, "tracking server, where the spec names none"),
    Variable("MLFLOW_CONFIGURE_LOGGING", "mlflow", "flag", "false", "no handlers of its own"),
    Variable("MLFLOW_DISABLE_TELEMETRY", "mlflow", "flag", "true", "nothing about a run leaves the machine"),
    Variable("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "mlflow", "flag", "true", "the terminal shows progress"),
    Variable("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "mlflow", "flag", "false", "the terminal shows progress"),
    Variable("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "mlflow", "number", "1", "the outbox repeats requests"),
    Variable("MLFLOW_HTTP_REQUEST_TIMEOUT", "mlflow", "number", "20", "seconds until a request has failed"),
    Variable("GIT_PYTHON_REFRESH", "mlflow", "text", "quiet", "MLflow's git library runs without git"),
)
VARIABLES = {variable.name: variable for variable in _ALL}
FAULT_VARIABLE = "REFINEDET_FAULT"


def read(name: str) -> str | None:
    """The text of a variable of the table, or its default; None where it is unset or empty."""
    return os.environ.get(name) or VARIABLES[name].default


def read_count(name: str, default: int) -> int:
    """A whole number of the environment."""
    return int(read(name) or default)


def suggest(name: str, value: str) -> None:
    """Set a variable of the table where the user has set nothing."""
    os.environ.setdefault(VARIABLES[name].name, value)


def inherited(**changes: str) -> dict[str, str]:
    """The environment of this process, with changes, for a process that it starts."""
    return {**os.environ, **changes}


def provide(group: Literal["ray", "mlflow"]) -> None:
    """Set the defaults of a library's variables; what the user has set stays."""
    for variable in _ALL:
        if variable.group == group and variable.default is not None:
            os.environ.setdefault(variable.name, variable.default)


def provide_ray_token() -> None:
    """Draw a token for the local node of this process, unless the environment names a cluster, or how to reach it.

    Call before Ray is imported, which reads it then; a node requires a token by default.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_ADDRESS" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}


def describe_variables() -> str:
    """The table in Markdown."""
    rows = ["| variable | kind | default | purpose |", "|---|---|---|---|"]
    rows += [
        f"| `{one.name}` | {one.kind} | {f'`{one.default}`' if one.default else ''} | {one.purpose} |" for one in _ALL
    ]
    return "\n".join(rows) + "\n"
