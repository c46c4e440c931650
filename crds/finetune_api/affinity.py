"""workers.affinity: Kubernetes' Affinity in full, with the names, the types and the required keys of its API.

Written out, because an object left unchecked may be nested without end; what a scheduler makes of it is the API
server's to judge, when the pods are made.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import KubernetesModel, LabelKey, LabelMap, LabelValue

_FEW, _MANY = 32, 256

Values = Annotated[list[LabelValue], Field(max_length=_MANY)]
Keys = Annotated[list[LabelKey], Field(max_length=_FEW)]
Weight = Annotated[int, Field(ge=1, le=100)]


class NodeSelectorRequirement(KubernetesModel):
    """A condition on a node's labels or fields."""

    key: LabelKey = Field(description="key of the label, or name of the field.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        description="operator is In, NotIn, Exists, DoesNotExist, Gt or Lt."
    )
    values: Values | None = Field(default=None, description="values that the operator compares with, at most 256.")


class NodeSelectorTerm(KubernetesModel):
    """Conditions that one node must meet together."""

    match_expressions: Annotated[list[NodeSelectorRequirement], Field(max_length=_FEW)] | None = Field(
        default=None, description="matchExpressions are conditions on the node's labels, at most 32."
    )
    match_fields: Annotated[list[NodeSelectorRequirement], Field(max_length=_FEW)] | None = Field(
        default=None, description="matchFields are conditions on the node's fields, at most 32."
    )


class NodeSelector(KubernetesModel):
    """Nodes that may be chosen."""

    node_selector_terms: Annotated[list[NodeSelectorTerm], Field(max_length=_FEW)] = Field(
        description="nodeSelectorTerms are alternatives, at most 32."
    )


class PreferredSchedulingTerm(KubernetesModel):
    """Nodes that are preferred."""

    weight: Weight = Field(description="weight of the preference, 1 to 100.")
    preference: NodeSelectorTerm = Field(description="preference is what the node should be.")


class NodeAffinity(KubernetesModel):
    """Which nodes."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = Field(
        default=None,
        description="requiredDuringSchedulingIgnoredDuringExecution is what a node must be for the pods to get there.",
    )
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[PreferredSchedulingTerm], Field(max_length=_FEW)] | None
    ) = Field(
        default=None,
        description="preferredDuringSchedulingIgnoredDuringExecution is what a node should be, at most 32 preferences.",
    )


class LabelSelectorRequirement(KubernetesModel):
    """A condition on labels."""

    key: LabelKey = Field(description="key of the label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(
        description="operator is In, NotIn, Exists or DoesNotExist."
    )
    values: Values | None = Field(default=None, description="values that the operator compares with, at most 256.")


class LabelSelector(KubernetesModel):
    """Objects by their labels; an empty one means all."""

    match_labels: LabelMap | None = Field(default=None, description="matchLabels are labels to have, at most 64.")
    match_expressions: Annotated[list[LabelSelectorRequirement], Field(max_length=_FEW)] | None = Field(
        default=None, description="matchExpressions are further conditions, at most 32."
    )


class PodAffinityTerm(KubernetesModel):
    """Other pods, and how near they are."""

    label_selector: LabelSelector | None = Field(default=None, description="labelSelector says which pods.")
    namespaces: Annotated[list[Annotated[str, Field(max_length=63)]], Field(max_length=_MANY)] | None = Field(
        default=None, description="namespaces of those pods, at most 256. Default: the job's own."
    )
    namespace_selector: LabelSelector | None = Field(
        default=None, description="namespaceSelector says which namespaces by their labels. Default: none."
    )
    topology_key: LabelKey = Field(description="topologyKey is the label of nodes that are one place.")
    match_label_keys: Keys | None = Field(
        default=None,
        description="matchLabelKeys are keys of the new pod's labels whose values those pods must have, at most 32.",
    )
    mismatch_label_keys: Keys | None = Field(
        default=None,
        description="mismatchLabelKeys are keys of the new pod's labels whose values those pods must not have, at most "
        "32.",
    )


class WeightedPodAffinityTerm(KubernetesModel):
    """Other pods whose nearness is preferred or avoided."""

    weight: Weight = Field(description="weight of the preference, 1 to 100.")
    pod_affinity_term: PodAffinityTerm = Field(description="podAffinityTerm is the preference.")


class PodAffinity(KubernetesModel):
    """Near or far from which pods."""

    required_during_scheduling_ignored_during_execution: (
        Annotated[list[PodAffinityTerm], Field(max_length=_FEW)] | None
    ) = Field(
        default=None,
        description="requiredDuringSchedulingIgnoredDuringExecution must hold for the pods to get there, at most 32 "
        "terms.",
    )
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[WeightedPodAffinityTerm], Field(max_length=_FEW)] | None
    ) = Field(
        default=None,
        description="preferredDuringSchedulingIgnoredDuringExecution should hold, at most 32 terms.",
    )


class Affinity(KubernetesModel):
    """Kubernetes' Affinity."""

    node_affinity: NodeAffinity | None = Field(default=None, description="nodeAffinity says which nodes.")
    pod_affinity: PodAffinity | None = Field(default=None, description="podAffinity says which pods to be near to.")
    pod_anti_affinity: PodAffinity | None = Field(
        default=None, description="podAntiAffinity says which pods to be far from."
    )
