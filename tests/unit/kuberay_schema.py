"""The part of KubeRay's v1 CRDs that a manifest of ours may use, as JSON Schema; any other field is an error.

Field names and enumerations are those of KubeRay 1.5 to 1.7 (ray-operator/apis/ray/v1) and of Kubernetes' core v1.
"""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "minLength": 1}
WORDS: Schema = {"type": "object", "additionalProperties": STRING}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITIES: Schema = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}}


def table(*required: str, **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def rows(of: Schema) -> Schema:
    return {"type": "array", "items": of, "minItems": 1}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = table(
    "name", name={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, namespace=STRING, labels=WORDS, annotations=WORDS
)
SECRET_KEY = table("name", "key", name=STRING, key=STRING)
ENVIRONMENT = table("name", name=STRING, value=STRING, valueFrom=table("secretKeyRef", secretKeyRef=SECRET_KEY))
CONTAINER = table(
    "name",
    "image",
    name=STRING,
    image=STRING,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=rows(STRING),
    args=rows(STRING),
    env=rows(ENVIRONMENT),
    ports=rows(table("containerPort", containerPort=COUNT, name={"type": "string", "maxLength": 15}, protocol=STRING)),
    resources=table(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=rows(table("name", "mountPath", name=STRING, mountPath=STRING, subPath=STRING, readOnly=FLAG)),
)
TOLERATION = table(
    key=STRING, operator=one_of("Exists", "Equal"), value=STRING, effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute")
)
VOLUME = table(
    "name", name=STRING, persistentVolumeClaim=table("claimName", claimName=STRING), emptyDir=table(medium=STRING, sizeLimit=STRING)
)
POD = table(
    "spec",
    metadata=table(labels=WORDS, annotations=WORDS),
    spec=table(
        "containers",
        containers=rows(CONTAINER),
        initContainers=rows(CONTAINER),
        volumes=rows(VOLUME),
        securityContext=table(
            fsGroup=COUNT, fsGroupChangePolicy=one_of("OnRootMismatch", "Always"), runAsUser=COUNT, runAsGroup=COUNT, runAsNonRoot=FLAG
        ),
        nodeSelector=WORDS,
        tolerations=rows(TOLERATION),
        serviceAccountName=STRING,
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        terminationGracePeriodSeconds=COUNT,
    ),
)
HEAD = table(
    "template",
    "rayStartParams",
    rayStartParams=WORDS,
    template=POD,
    serviceType=STRING,
    enableIngress=FLAG,
    resources=WORDS,
    labels=WORDS,
)
WORKERS = table(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
    "rayStartParams",
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    priority=COUNT,
    suspend=FLAG,
    rayStartParams=WORDS,
    resources=WORDS,
    labels=WORDS,
    template=POD,
)
AUTOSCALER = table(
    version=one_of("v1", "v2"),
    idleTimeoutSeconds=COUNT,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    image=STRING,
    resources=table(requests=QUANTITIES, limits=QUANTITIES),
    env=rows(ENVIRONMENT),
)
GCS_FAULT_TOLERANCE = table(
    backend=one_of("redis", "rocksdb"), redisAddress=STRING, externalStorageNamespace=STRING, storage=table(claimName=STRING, size=STRING)
)
CLUSTER = table(
    "headGroupSpec",
    "authOptions",
    rayVersion=STRING,
    authOptions=table("mode", mode=one_of("token"), secretName=STRING),  # `disabled` is no choice of ours
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    gcsFaultToleranceOptions=GCS_FAULT_TOLERANCE,
    headServiceAnnotations=WORDS,
    suspend=FLAG,
    headGroupSpec=HEAD,
    workerGroupSpecs=rows(WORKERS),
)
JOB = table(
    "entrypoint",
    "rayClusterSpec",
    entrypoint=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    metadata=WORDS,
    entrypointNumCpus={"type": "number"},
    submitterConfig=table(backoffLimit=COUNT),
    submitterPodTemplate=POD,
    suspend=FLAG,
    rayClusterSpec=CLUSTER,
)
SERVICE = table("serveConfigV2", "rayClusterConfig", serveConfigV2=STRING, rayClusterConfig=CLUSTER, serveService=table())


def manifest(kind: str, spec: Schema) -> Schema:
    return table("apiVersion", "kind", "metadata", "spec", apiVersion=one_of("ray.io/v1"), kind=one_of(kind), metadata=METADATA, spec=spec)


SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}
MANIFESTS = {kind: Draft202012Validator(manifest(kind, spec)) for kind, spec in SPECS.items()}
