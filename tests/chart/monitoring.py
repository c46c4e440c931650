"""The chart's alerts and dashboard, as they stand in its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "finetune-operator"

RULES_FILE = CHART / "rules" / "finetune-operator.yaml"
NAMESPACE = "finetune-system"
"""Of the operator, in the rule file."""
RULES: Mapping[str, Any] = yaml.safe_load(RULES_FILE.read_text())
ALERTS: Mapping[str, dict[str, Any]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}

DASHBOARD: Mapping[str, Any] = json.loads((CHART / "dashboards" / "finetune-operator.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}
"""By the panel's title and the query's letter."""
