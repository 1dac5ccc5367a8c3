"""Schemas of the custom resources that docker/kubernetes/ uses, written here from what their definitions say of the
fields in use: KEDA (keda.sh/v1alpha1) and the Prometheus operator (monitoring.coreos.com/v1). Stricter than the
definitions: a field that is not in use here is not known here. Kubernetes' own resources are checked with its
published schemas."""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER_IN_TEXT = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
_PERIOD = {"type": "string", "pattern": r"^\d+(s|m|h)$"}


def _fields(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {**required, **optional},
    }


def _resource(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    labels = {"type": "object", "additionalProperties": _TEXT}
    metadata = _fields({"name": _TEXT, "namespace": _TEXT}, labels=labels, annotations=labels)
    return _fields({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


_scaling = _fields(
    {},
    stabilizationWindowSeconds=_COUNT | {"maximum": 3600},
    selectPolicy={"enum": ["Max", "Min", "Disabled"]},
    policies={
        "type": "array",
        "minItems": 1,
        "items": _fields(
            {
                "type": {"enum": ["Pods", "Percent"]},
                "value": {"type": "integer", "minimum": 1},
                "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
            }
        ),
    },
)

# What the trigger `postgresql` takes from `metadata`; all of it is text. The password comes from the authentication.
_postgresql = _fields(
    {
        "type": {"const": "postgresql"},
        "metadata": _fields(
            {
                "query": _TEXT,
                "targetQueryValue": _NUMBER_IN_TEXT,
                "host": _TEXT,
                "port": _NUMBER_IN_TEXT,
                "dbName": _TEXT,
                "userName": _TEXT,
                "sslmode": {"enum": ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]},
            },
            activationTargetQueryValue=_NUMBER_IN_TEXT,
        ),
    },
    name=_TEXT,
    metricType={"enum": ["AverageValue", "Value"]},
    authenticationRef=_fields({"name": _TEXT}, kind=_TEXT),
)

_authorization = _fields({"credentials": _fields({"name": _TEXT, "key": _TEXT})}, type={"const": "Bearer"})
_selector = _fields({"matchLabels": {"type": "object", "minProperties": 1, "additionalProperties": _TEXT}})
_endpoint = _fields({"port": _TEXT}, path=_TEXT, interval=_PERIOD, authorization=_authorization)

SCHEMAS: dict[str, dict[str, Any]] = {
    "ScaledObject": _resource(
        "keda.sh/v1alpha1",
        "ScaledObject",
        _fields(
            {
                "scaleTargetRef": _fields({"name": _TEXT}, kind=_TEXT, apiVersion=_TEXT),
                "triggers": {"type": "array", "minItems": 1, "items": _postgresql},
            },
            pollingInterval=_COUNT,
            cooldownPeriod=_COUNT,
            minReplicaCount=_COUNT,
            maxReplicaCount=_COUNT,
            advanced=_fields(
                {},
                horizontalPodAutoscalerConfig=_fields({}, behavior=_fields({}, scaleUp=_scaling, scaleDown=_scaling)),
            ),
        ),
    ),
    "TriggerAuthentication": _resource(
        "keda.sh/v1alpha1",
        "TriggerAuthentication",
        _fields(
            {
                "secretTargetRef": {
                    "type": "array",
                    "minItems": 1,
                    "items": _fields({"parameter": {"const": "password"}, "name": _TEXT, "key": _TEXT}),
                }
            }
        ),
    ),
    "ServiceMonitor": _resource(
        "monitoring.coreos.com/v1",
        "ServiceMonitor",
        _fields({"selector": _selector, "endpoints": {"type": "array", "minItems": 1, "items": _endpoint}}),
    ),
    "PodMonitor": _resource(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        _fields({"selector": _selector, "podMetricsEndpoints": {"type": "array", "minItems": 1, "items": _endpoint}}),
    ),
}
