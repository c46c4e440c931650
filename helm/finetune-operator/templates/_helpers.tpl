{{- define "finetune-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 59 characters: `-tls` follows in the name of the Secret. */}}
{{- define "finetune-operator.fullname" -}}
{{- $name := include "finetune-operator.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 59 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 59 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 59 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "finetune-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Image of (dict "image" <registry, repository, tag, digest> "context" $). Without "image": the operator's. */}}
{{- define "finetune-operator.image" -}}
{{- $context := .context | default . -}}
{{- $image := .image | default $context.Values.image -}}
{{- $registry := $context.Values.global.imageRegistry | default $image.registry -}}
{{- $version := printf ":%s" ($image.tag | default $context.Chart.AppVersion) -}}
{{- if $image.digest -}}{{- $version = printf "@%s" $image.digest -}}{{- end -}}
{{- with $registry -}}{{ trimSuffix "/" . }}/{{- end -}}
{{- $image.repository }}{{ $version -}}
{{- end -}}

{{/* Rights in a namespace with jobs: exactly the verbs that are used; kopf's discovery of kinds is open to everybody. */}}
{{- define "finetune-operator.jobRules" -}}
# delete: ttlSecondsAfterFinished.
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [get, list, watch, delete]
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [update]
# An attempt; it is made and removed, never changed.
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, watch, create, delete]
# Read only: how an attempt or a verification ended, and who sends progress.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
# The verification of an adapter (output.verify); it goes with its FineTuneJob.
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, create]
# The effective job of an attempt (create, delete) and the certificate that trainers trust (create, update).
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, update, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}

{{- define "finetune-operator.tokenRules" -}}
# Who a token belongs to that comes with progress.
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
{{- end -}}

{{/* roleRef and subjects of (dict "kind" <Role or ClusterRole> "name" <its name> "context" $). */}}
{{- define "finetune-operator.binding" -}}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ .kind }}
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "finetune-operator.serviceAccountName" .context }}
    namespace: {{ .context.Release.Namespace }}
{{- end -}}

{{/* Labels of every trainer, whatever its job: what a NetworkPolicy selects them by. */}}
{{- define "finetune-operator.trainerLabels" -}}
app.kubernetes.io/name: finetune-trainer
app.kubernetes.io/managed-by: finetune-operator
{{- end -}}

{{/* An egress rule. OpenShift's DNS listens on 5353, and policies see the port behind a Service. */}}
{{- define "finetune-operator.dnsEgress" -}}
- ports:
    {{- range $port := list 53 5353 }}
    {{- range $protocol := list "UDP" "TCP" }}
    - {port: {{ $port }}, protocol: {{ $protocol }}}
    {{- end }}
    {{- end }}
{{- end -}}

{{/* An egress rule of (dict "cidrs" <list> "ports" <list>). */}}
{{- define "finetune-operator.cidrEgress" -}}
- to:
    {{- range .cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    {{- range .ports }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
{{- end -}}

{{/* A variable per value of a map: FINETUNE_OPERATOR_ and the key in snake case. Empty ones are left out. */}}
{{- define "finetune-operator.settings" -}}
{{- range $key, $value := . }}
{{- $text := kindIs "string" $value | ternary $value (toJson $value) }}
{{- if not (has $text (list "" "{}")) }}
- name: FINETUNE_OPERATOR_{{ snakecase $key | upper }}
  value: {{ $text | quote }}
{{- end }}
{{- end }}
{{- end -}}
