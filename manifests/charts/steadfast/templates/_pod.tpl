{{/* What every object of a component is labelled with: dict "root" . "component" NAME
"namespace" NAMESPACE */}}
{{- define "steadfast.labels" -}}
app.kubernetes.io/name: steadfast-{{ .component }}
app.kubernetes.io/part-of: steadfast
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- define "steadfast.image" -}}
{{ .root.Values.image.registry }}/steadfast-{{ .component }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* What the pods of every component have in common */}}
{{- define "steadfast.pod" -}}
serviceAccountName: steadfast-{{ .component }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile: { type: RuntimeDefault }
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: { matchLabels: { app.kubernetes.io/name: steadfast-{{ .component }} } }
{{- if gt (int .replicas) 1 }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector: { matchLabels: { app.kubernetes.io/name: steadfast-{{ .component }} } }
{{- end }}
{{- end }}

{{- define "steadfast.container" -}}
name: {{ .component }}
image: {{ include "steadfast.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
livenessProbe:
  httpGet: { path: /live, port: admin }
  initialDelaySeconds: 10
readinessProbe:
  httpGet: { path: /ready, port: admin }
  periodSeconds: 2
resources: {{ toYaml .resources | nindent 2 }}
{{- end }}

{{- define "steadfast.account" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: steadfast-{{ .component }}
  namespace: {{ .namespace }}
  labels: {{ include "steadfast.labels" . | nindent 4 }}
{{- end }}

{{/* One may be away at a time, where there are several */}}
{{- define "steadfast.budget" -}}
{{- if gt (int .replicas) 1 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: steadfast-{{ .component }}
  namespace: {{ .namespace }}
  labels: {{ include "steadfast.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector: { matchLabels: { app.kubernetes.io/name: steadfast-{{ .component }} } }
{{- end }}
{{- end }}

{{/* What every meshed pod has in common, for the webhook and for `steadfast inject` */}}
{{- define "steadfast.injection" -}}
{{ dict
  "controlNamespace" .Release.Namespace
  "trustDomain" .Values.trustDomain
  "clusterDomain" .Values.clusterDomain
  "proxyImage" (printf "%s/steadfast-proxy" .Values.image.registry)
  "initImage" (printf "%s/steadfast-init" .Values.image.registry)
  "tag" (printf "%v" (.Values.image.tag | default .Chart.AppVersion))
  "pullPolicy" .Values.image.pullPolicy
  "resources" .Values.proxy.resources
| toPrettyJson }}
{{- end }}
