"""The JobSet manifest against the published schemas.

The core schema (Job, pod template, ConfigMap) comes with the package kubernetes-validate; strict: a key it does not know is an error.
JobSet's own fields (https://github.com/kubernetes-sigs/jobset, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml) come as the
models that the package kubeflow-trainer-api carries, generated from the same API description.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllmrec_jax.config import ConfigError, DistributedConfig
from mllmrec_jax.distributed import EXIT_PREEMPTED, resolve_processes
from mllmrec_launch.kubernetes import KubernetesOptions, render_kubernetes

GPU: dict[str, Any] = {
    "config": "quickstart",
    "image": "registry/mllmrec:1",
    "nodes": 4,
    "devices_per_node": 8,
    "gpu_product": "NVIDIA-H100-80GB-HBM3",
    "claim": "runs",
    "cpu": "16",
}
TPU: dict[str, Any] = {
    "config": "quickstart",
    "image": "i",
    "nodes": 4,
    "accelerator": "tpu",
    "devices_per_node": 4,
    "tpu_type": "tpu-v5p-slice",
    "tpu_topology": "2x2x4",
}
FULL: dict[str, Any] = {
    **GPU,
    "namespace": "lab",
    "memory": "64Gi",
    "service_account": "trainer",
    "node_selector": ("pool=a", "spot=true"),
    "mount": "/runs",
    "name": "trial",
}
CPU: dict[str, Any] = {"config": "quickstart", "image": "i", "accelerator": "none"}


def render(**options: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render_kubernetes(KubernetesOptions(**options), ["--seed", "3"])))


def find_pod(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("options", [GPU, TPU, FULL, CPU])
def test_job_and_config_map_fit_the_core_schema(options: dict[str, Any], tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, of the dev dependencies, is not installed").validate
    (tmp_path / "a.toml").write_text('name = "run"  # it\'s: "quoted" ü\n')
    config_map, jobset = render(**options | {"config": str(tmp_path / "a.toml")})
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    validate(config_map, "1.30", strict=True)
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}, "1.30", strict=True)


@pytest.mark.parametrize("options", [GPU, TPU, FULL, CPU])
def test_jobset_has_the_documented_fields(options: dict[str, Any]) -> None:
    reason = "kubeflow-trainer-api, of the dev dependencies, is not installed"
    models = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason=reason)
    [jobset] = render(**options)
    find_pod(jobset)["containers"][0].pop("resources", None)  # the models write quantities as objects; the core schema has them
    model = models.JobsetV1alpha2JobSet.model_validate(jobset)
    assert model.model_dump(by_alias=True, exclude_none=True) == jobset  # the models drop fields they do not know
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"


@pytest.mark.parametrize("options", [GPU, FULL])
def test_pods_find_process_zero_by_its_name_in_the_headless_service(options: dict[str, Any]) -> None:
    [jobset] = render(**options)
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    [workers] = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name}
    assert (job["completionMode"], job["completions"], job["parallelism"], workers["replicas"]) == ("Indexed", 4, 4, 1)
    words = find_pod(jobset)["containers"][0]["command"]
    fields = dict(itertools.pairwise(words))
    config = DistributedConfig(
        "kubernetes", fields["--distributed.coordinator"], int(fields["--distributed.process-count"]), heartbeat_timeout_s=30
    )
    assert fields["--distributed.method"] == config.method and fields["--seed"] == "3"
    # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>
    assert resolve_processes(config, {"JOB_COMPLETION_INDEX": "2"}) == {
        "cluster_detection_method": "deactivate",
        "coordinator_address": f"{name}-{workers['name']}-0-0.{name}:8476",
        "num_processes": 4,
        "process_id": 2,
    }


def test_preemption_starts_again_and_does_not_count() -> None:
    [jobset] = render(**GPU, max_restarts=5, grace_s=300)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert policy["rules"] == [
        {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    exit_rule, disruption = job["podFailurePolicy"]["rules"]
    pod = find_pod(jobset)
    assert exit_rule["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [EXIT_PREEMPTED]}
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert exit_rule["action"] == disruption["action"] == "FailJob"
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize(
    ("options", "resource", "count", "selector"),
    [
        (GPU, "nvidia.com/gpu", "8", {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}),
        (FULL, "nvidia.com/gpu", "8", {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "pool": "a", "spot": "true"}),
        (
            TPU,
            "google.com/tpu",
            "4",
            {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "2x2x4"},
        ),
    ],
)
def test_pods_go_where_the_accelerators_are(options: dict[str, Any], resource: str, count: str, selector: dict[str, str]) -> None:
    pod = find_pod(render(**options)[0])
    assert pod["nodeSelector"] == selector
    assert pod["tolerations"][0]["key"] == resource
    resources = pod["containers"][0]["resources"]
    assert resources["limits"][resource] == count and resources["limits"] == resources["requests"]
    assert pod["containers"][0]["command"][-1] == "tpu" or resource != "google.com/tpu"


def test_a_configuration_file_travels_as_it_is(tmp_path: Path) -> None:
    text = 'name = "run"  # it\'s: {"quoted"} ü\n[data]\nsource = "posterworld"\n'
    (tmp_path / "My Run.toml").write_text(text, encoding="utf-8")
    config_map, jobset = render(**FULL | {"config": str(tmp_path / "My Run.toml")})
    assert config_map["data"] == {"run.toml": text} and config_map["metadata"] == {"name": "trial-config", "namespace": "lab"}
    pod = find_pod(jobset)
    container = pod["containers"][0]
    assert "/etc/mllmrec/run.toml" in container["command"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared-memory": "/dev/shm", "storage": "/runs", "config": "/etc/mllmrec"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts) and container["workingDir"] == "/runs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TPU | {"tpu_topology": None}, "--tpu-topology: expected a value with --accelerator tpu, got None"),
        (GPU | {"tpu_type": "tpu-v5p-slice"}, "--tpu-type: expected nothing with --accelerator gpu, got 'tpu-v5p-slice'"),
        (CPU | {"gpu_product": "H100"}, "--gpu-product: expected nothing with --accelerator none, got 'H100'"),
    ],
)
def test_options_of_another_accelerator_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_kubernetes(KubernetesOptions(**options), [])
