"""Kubernetes: a JobSet (jobset.x-k8s.io/v1alpha2) with one pod a node and one process a pod."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mllmrec_jax.config import ConfigError, Count, PositiveInt
from mllmrec_jax.distributed import EXIT_PREEMPTED
from mllmrec_launch.options import BatchOptions, Line, Port, Word, build_program
from mllmrec_launch.template import render_template

SUBMIT = ("kubectl", "apply", "-f", "-")
# Pods are called <name>-workers-0-<index>, and such a name has 63 characters at most.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
_WORKERS = "workers"
_CONFIG_FOLDER = "/etc/mllmrec"
_CONFIG_NAME = "run.toml"
_RESOURCES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KubernetesOptions(BatchOptions):
    """A JobSet manifest for kubectl; the cluster needs the JobSet controller."""

    image: Word
    """Container image that has mllmrec-jax installed."""
    name: Name = "mllmrec"
    """Name of the JobSet and of its headless service."""
    namespace: Name | None = None
    """Namespace; kubectl's own where none is given."""
    nodes: PositiveInt = 1
    """Pods, one a node, one process each."""
    accelerator: Literal["none", "gpu", "tpu"] = "gpu"
    """What a pod computes on."""
    devices_per_node: Count = 1
    """GPUs or TPU chips a pod."""
    gpu_product: Word | None = None
    """Node label nvidia.com/gpu.product (NVIDIA-H100-80GB-HBM3)."""
    tpu_type: Word | None = None
    """Node label cloud.google.com/gke-tpu-accelerator (tpu-v5p-slice)."""
    tpu_topology: Word | None = None
    """Node label cloud.google.com/gke-tpu-topology (2x2x4)."""
    node_selector: tuple[Annotated[str, Field(pattern=r"^[^\s=]+=[^\s=]*$")], ...] = ()
    """More node labels, `key=value` each."""
    cpu: Word | None = None
    """Processor cores a pod (16)."""
    memory: Word | None = None
    """Memory a pod (64Gi)."""
    claim: Word | None = None
    """PersistentVolumeClaim, ReadWriteMany, for data, cache and run folders; a restart goes on from what it holds."""
    mount: Annotated[str, Field(pattern=r"^/\S+$")] = "/data"
    """Where the claim is mounted; also the working folder."""
    service_account: Word | None = None
    """Service account of the pods."""
    grace_s: PositiveInt = 120
    """Time between SIGTERM and SIGKILL: longer than a step and a checkpoint take (seconds)."""
    max_restarts: Count = 3
    """Restarts after failures; preemptions do not count."""
    port: Port = 8476
    """Port of process 0."""
    python: Line = "python"
    """The interpreter in the image."""


def render_kubernetes(options: KubernetesOptions, overrides: Sequence[str]) -> str:
    """The manifest: a ConfigMap, where the configuration is a file, and a JobSet.

    Raises:
      ConfigError: options of one accelerator are given for another, or a TPU lacks its type and topology.
    """
    path = Path(options.config)
    rank_zero = f"{options.name}-{_WORKERS}-0-0.{options.name}:{options.port}"
    # GKE numbers the workers of a TPU slice; elsewhere the Job does.
    distributed: dict[str, Any] = (
        {"method": "tpu"}
        if options.accelerator == "tpu"
        else {"method": "kubernetes", "coordinator": rank_zero, "process_count": options.nodes}
    )
    program = build_program(
        options, overrides, python=options.python, config=f"{_CONFIG_FOLDER}/{_CONFIG_NAME}" if path.is_file() else None, **distributed
    )
    resources = {"cpu": options.cpu, "memory": options.memory}
    if options.accelerator != "none":
        resources[_RESOURCES[options.accelerator]] = str(options.devices_per_node)
    return render_template(
        "kubernetes.yaml.jinja",
        options=options,
        workers=_WORKERS,
        program=program,
        preempted=EXIT_PREEMPTED,
        config_folder=_CONFIG_FOLDER,
        config_name=_CONFIG_NAME,
        config_text=path.read_text(encoding="utf-8") if path.is_file() else "",
        device=_RESOURCES.get(options.accelerator, ""),
        resources={key: value for key, value in resources.items() if value is not None},
        selector=_select_nodes(options),
    )


def _select_nodes(options: KubernetesOptions) -> dict[str, str]:
    tpu = {"--tpu-type": options.tpu_type, "--tpu-topology": options.tpu_topology}
    for flag, value in tpu.items():
        if (value is not None) != (options.accelerator == "tpu"):
            wanted = "a value" if options.accelerator == "tpu" else "nothing"
            raise ConfigError(f"launch kubernetes: {flag}: expected {wanted} with --accelerator {options.accelerator}, got {value!r}")
    if options.gpu_product is not None and options.accelerator != "gpu":
        raise ConfigError(
            f"launch kubernetes: --gpu-product: expected nothing with --accelerator {options.accelerator}, got {options.gpu_product!r}"
        )
    labels = {
        "nvidia.com/gpu.product": options.gpu_product,
        "cloud.google.com/gke-tpu-accelerator": options.tpu_type,
        "cloud.google.com/gke-tpu-topology": options.tpu_topology,
    }
    selector = {key: value for key, value in labels.items() if value is not None}
    return selector | dict(pair.split("=", 1) for pair in options.node_selector)
