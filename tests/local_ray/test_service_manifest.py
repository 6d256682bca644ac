"""The scoring service of `deploy/kuberay/rayservice.yaml`, as Ray Serve reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

MANIFEST = Path(__file__).resolve().parents[2] / "deploy" / "kuberay" / "rayservice.yaml"


def test_serve_accepts_the_file_and_finds_the_application() -> None:
    document = yaml.safe_load(yaml.safe_load(MANIFEST.read_text())["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(document).applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(pytest.importorskip(module), name))
