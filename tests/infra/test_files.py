"""The files under infra/, held to the schemas and linters of those that read them."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from refinedet.pipeline.config.spec_files import load_spec

INFRA = Path(__file__).resolve().parents[2] / "infra"
VM_FILES = sorted(INFRA.glob("ray-up-*.yaml"))
RAY = "/tmp/ray"


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if not found:
        pytest.skip(f"needs {name}, which is not installed")
    return found


@pytest.mark.parametrize("file", sorted(INFRA.rglob("Dockerfile")), ids=lambda file: str(file.relative_to(INFRA)))
def test_container_files_pass_the_linter_and_do_not_run_as_root(file):
    done = subprocess.run([_program("hadolint"), str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    last_stage = file.read_text().rsplit("\nFROM ", 1)[-1]
    (user,) = re.findall(r"^USER (\S+)$", last_stage, re.MULTILINE)
    assert user.split(":")[0] not in ("root", "0")


def test_the_image_is_built_for_both_generations_of_gpus_from_pinned_packages():
    content = (INFRA / "Dockerfile").read_text()
    assert "CUDAARCHS=80-real;90" in content
    assert content.count("--constraint constraints.txt") == 1, "of uv itself"
    assert content.count("--constraint lock.txt") == 2
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", content, re.MULTILINE) for name in line.split()}
    assert copied == kept
    project = tomllib.loads((INFRA.parent / "pyproject.toml").read_text())
    packages = set(project["tool"]["scikit-build"]["wheel"]["packages"].values())
    assert packages <= copied, "the wheel is built of these"


def test_the_bases_of_the_image_are_pinned_by_digest_and_the_fabric_by_checksum():
    content = (INFRA / "Dockerfile").read_text()
    bases = dict(re.findall(r"^ARG (\w*BASE)=(\S+)$", content, re.MULTILINE))
    assert set(re.findall(r"^FROM \$\{(\w+)\}", content, re.MULTILINE)) == set(bases)
    assert all(re.fullmatch(r"nvidia/cuda:[\w.-]+@sha256:[0-9a-f]{64}", base) for base in bases.values())
    assert re.search(r"^ARG EFA_INSTALLER_SHA256=[0-9a-f]{64}$", content, re.MULTILINE)
    stages = [line.split() for line in content.splitlines() if line.startswith("FROM ")]
    assert stages[-1] == ["FROM", "node"], "without --target it is the plain image"


def test_the_image_installs_pinned_versions_by_their_hashes():
    """Of the lock: `make lock` writes it."""
    text = (INFRA / "lock.txt").read_text()
    locked = re.findall(r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, flags=re.MULTILINE)
    assert len(locked) == len(re.findall(r"==", text)) > 100
    assert "://" not in text
    pins = dict(line.split("==") for line in (INFRA.parent / "constraints.txt").read_text().split())
    others = [name for name, version, _ in locked if pins.get(name, version) != version]
    assert not others, "make lock"
    assert {"torch", "ray", "deepspeed", "mlflow", "setuptools", "cmake"} <= {name for name, *_ in locked}


@pytest.mark.slow
def test_the_bill_of_materials_names_what_is_installed():
    done = subprocess.run(
        [_program("make"), "--assume-old=install", "sbom"], cwd=INFRA.parent, capture_output=True, text=True
    )
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip("needs a package index")
    assert done.returncode == 0, done.stderr
    bill = json.loads((INFRA.parent / "build" / "sbom.json").read_text())
    versions = {component["name"]: component["version"] for component in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    assert all(versions[name] == importlib.metadata.version(name) for name in ("torch", "ray", "deepspeed", "mlflow"))


@pytest.mark.parametrize("file", VM_FILES, ids=lambda file: file.name)
def test_clusters_of_machines_are_what_ray_accepts(file):
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(file.read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    assert whole["setup_commands"] == whole["head_setup_commands"] == [], "none of Ray's own, which install another Ray"
    types = config["available_node_types"]
    assert sum(entry.get("max_workers", 0) for entry in types.values()) <= config["max_workers"]
    assert types["head"]["resources"]["CPU"] == 0
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in command for command in commands)


@pytest.mark.parametrize("file", VM_FILES, ids=lambda file: file.name)
def test_only_the_head_has_the_rights_to_start_machines(file):
    types = yaml.safe_load(file.read_text())["available_node_types"]
    held = {name: _identity(entry["node_config"]) for name, entry in types.items()}
    assert held.pop("head") == "refinedet-head"
    assert set(held.values()) == {"refinedet"}


def _identity(machine: dict) -> str:
    if "IamInstanceProfile" in machine:
        return machine["IamInstanceProfile"]["Name"]
    (account,) = machine["serviceAccounts"]
    return account["email"].partition("@")[0]


def test_the_machines_that_are_priced_are_those_that_are_started():
    types = yaml.safe_load((INFRA / "ray-up-aws.yaml").read_text())["available_node_types"]
    walk = (INFRA / "README.md").read_text()
    for entry in types.values():
        assert f"({entry['node_config']['InstanceType']})" in walk


def test_both_clouds_are_there():
    assert {yaml.safe_load(file.read_text())["provider"]["type"] for file in VM_FILES} == {"aws", "gcp"}


def test_jobs_that_take_gpus_wait_for_a_machine_to_boot():
    specs = [
        load_spec(str(path))
        for path in (INFRA.parent / "jobs").rglob("*.yaml")
        if path.parent.name not in ("base", "sweeps")
    ]
    waits = {spec.cluster.resource_timeout_s for spec in specs if spec.cluster.gpus_per_worker}
    assert waits == {1800}


@pytest.mark.parametrize("file", sorted(INFRA.rglob("compose.yaml")), ids=lambda file: file.parent.name)
def test_services_hold_no_password_and_name_what_is_there(file):
    content = yaml.safe_load(file.read_text())
    services = content["services"]
    for service in services.values():
        for name, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|KEY$", name):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name} must come from the environment"
        for other in service.get("depends_on") or ():
            assert other in services
        for volume in service.get("volumes") or ():
            source = volume.split(":")[0]
            assert (file.parent / source).exists() if source.startswith("./") else source in (*content["volumes"], RAY)


@pytest.mark.parametrize("file", sorted(INFRA.rglob("compose.yaml")), ids=lambda file: file.parent.name)
def test_every_variable_of_the_services_is_in_their_example(file):
    used = set(re.findall(r"\$\{(\w+)", file.read_text()))
    assert used == set(re.findall(r"^(\w+)=", (file.parent / "env.example").read_text(), re.MULTILINE))


def test_prometheus_reads_on_the_head_where_ray_says_the_nodes_are():
    services = yaml.safe_load((INFRA / "monitoring" / "compose.yaml").read_text())["services"]
    assert all(service["network_mode"] == "host" for service in services.values())
    assert f"{RAY}:{RAY}:ro" in services["prometheus"]["volumes"]
    collected = yaml.safe_load((INFRA / "monitoring" / "prometheus.yml").read_text())["scrape_configs"][0]
    assert collected["file_sd_configs"][0]["files"] == [f"{RAY}/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    for file in VM_FILES:
        config = yaml.safe_load(file.read_text())
        assert config["docker"]["head_run_options"] == [f"--volume {RAY}:{RAY}"]
        assert config["initialization_commands"][0].endswith(f" {RAY}"), "the image's user owns it, not root"


def test_every_metric_that_is_shown_or_alerted_on_is_kept():
    from refinedet.pipeline.cluster.gauges import GAUGES, STEP_SECONDS, VALIDATION

    kept = {f"ray_refinedet_{name}" for name in (*GAUGES, STEP_SECONDS, VALIDATION)}
    dashboard = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((INFRA / "monitoring" / "alerts.yml").read_text())
    expressions += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    used = {name for expression in expressions for name in re.findall(r"ray_refinedet_\w+", expression)}
    assert used <= kept
    assert all(rule["annotations"]["remedy"] for group in alerts["groups"] for rule in group["rules"])


def test_alerts_reach_a_receiver_that_exists():
    """The address that Prometheus sends to is Alertmanager's; every route names a receiver, without its URL."""
    services = yaml.safe_load((INFRA / "monitoring" / "compose.yaml").read_text())["services"]
    (listened,) = (word for word in services["alertmanager"]["command"] if word.startswith("--web.listen-address="))
    sent = yaml.safe_load((INFRA / "monitoring" / "prometheus.yml").read_text())["alerting"]["alertmanagers"]
    assert sent[0]["static_configs"][0]["targets"] == [listened.partition("=")[2]]
    content = yaml.safe_load((INFRA / "monitoring" / "alertmanager.yml").read_text())
    receivers = {receiver["name"]: receiver for receiver in content["receivers"]}
    routes = [content["route"], *content["route"]["routes"]]
    assert {route["receiver"] for route in routes} == set(receivers)
    (webhook,) = receivers["team"]["webhook_configs"]
    assert set(webhook) == {"url_file", "send_resolved"}
    (secret,) = services["alertmanager"]["configs"]
    assert secret["target"] == webhook["url_file"]
    alerts = yaml.safe_load((INFRA / "monitoring" / "alerts.yml").read_text())["groups"][0]["rules"]
    severities = {rule["labels"]["severity"] for rule in alerts}
    assert "page" in severities
    named = {name for rule in content["inhibit_rules"] for text in (*rule["source_matchers"], *rule["target_matchers"])
             for name in re.findall(r"[A-Z]\w+", text)}  # fmt: skip
    assert named <= {rule["alert"] for rule in alerts}


def test_skypilot_starts_a_job_whose_keys_exist():
    content = yaml.safe_load((INFRA / "skypilot" / "train.yaml").read_text())
    assert set(re.findall(r"\$(?:BUCKET|JOB)\b", content["run"])) == {f"${name}" for name in content["envs"]}
    command = content["run"].replace("$BUCKET", content["envs"]["BUCKET"]).replace('"', "")
    overrides = [word for word in command.split("refinedet.pipeline.training")[1].split() if "=" in word]
    spec = load_spec(content["envs"]["JOB"], overrides)
    assert spec.runs == "s3://BUCKET/runs"


def test_prometheus_accepts_its_files():
    promtool = _program("promtool")
    folder = INFRA / "monitoring"
    subprocess.run([promtool, "check", "rules", "alerts.yml"], cwd=folder, check=True, capture_output=True)
    command = [promtool, "check", "config", "--syntax-only", "prometheus.yml"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_alertmanager_accepts_its_file(tmp_path):
    amtool, content = _program("amtool"), (INFRA / "monitoring" / "alertmanager.yml").read_text()
    version = subprocess.run([amtool, "--version"], check=True, capture_output=True, text=True)
    major, minor = re.findall(r"\d+", version.stdout)[:2]
    if (int(major), int(minor)) < (0, 26):  # Debian 12's; the image's reads a webhook's URL from a file
        content = re.sub("url_file: .+", "url: http://localhost", content)
    file = tmp_path / "alertmanager.yml"
    file.write_text(content)
    routing = ["config", "routes", "test", f"--config.file={file}", "--verify.receivers=team", "severity=page"]
    for command in (["check-config", str(file)], routing):
        done = subprocess.run([amtool, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_servers_mlflow_is_the_clients():
    pins = dict(re.findall(r"^(mlflow|boto3)==(\S+)$", (INFRA.parent / "constraints.txt").read_text(), re.MULTILINE))
    server = dict(re.findall(r"'?(mlflow|boto3)(?:\[auth\])?==([\d.]+)", (INFRA / "mlflow" / "Dockerfile").read_text()))
    assert server == pins
