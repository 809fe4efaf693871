"""A user's script is checked by mypy: right arguments pass, wrong ones do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

RIGHT = """
import netdecouple

settings = netdecouple.Settings(exclude=("head",))
result = netdecouple.decouple("model.onnx", "images/", macs=0.5, settings=settings)
result.timed(["onnxruntime"]).save_report("report.html")
result.save("faster.onnx")
share: float = result.report.macs / result.report.macs_before
agreement = result.report.agreement
if agreement is not None:
    print(agreement.divergence, share)
swept = netdecouple.sweep("model.onnx", "images/", macs=(0.8, "2x"), labels="test.npz:images,labels")
print(swept.knee)
"""
WRONG = {
    'netdecouple.decouple("model.onnx", "images/", mac=0.5)': "No overload variant",
    'netdecouple.decouple("model.onnx", "images/", macs=[0.5])': "No overload variant",
    'netdecouple.decouple("model.onnx", macs=0.5).reports': 'has no attribute "reports"',
    'netdecouple.sweep("model.onnx", emitted="fused")': 'Unexpected keyword argument "emitted"',
    "netdecouple.Settings(seed=0.5)": "incompatible type",
}


@pytest.mark.slow
def test_a_users_script_is_checked(tmp_path: Path) -> None:
    lines = ["import netdecouple", *WRONG]
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-torch.*,scipy.*,onnxruntime.*,threadpoolctl.*]\n"
        "ignore_missing_imports = true\nfollow_imports = skip\n"
    )
    arguments = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    found, _, _ = api.run([*arguments, str(tmp_path / "right.py"), str(tmp_path / "wrong.py")])
    by_line: dict[str, str] = {}
    for name, line, message in re.findall(r"(right|wrong)\.py:(\d+): error: (.*)", found):
        by_line[f"{name}:{line}"] = by_line.get(f"{name}:{line}", "") + message
    assert not [place for place in by_line if place.startswith("right")]
    for number, (code, message) in enumerate(WRONG.items(), 2):
        assert message in by_line.get(f"wrong:{number}", ""), code
